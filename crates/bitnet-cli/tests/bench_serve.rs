//! `bitnet bench-serve` against a server of the same build.

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

use common::{bitnet, failure, json, stdout};

/// A server on a port of the system's choice, ended with the test.
struct Server {
    child: Child,
    url: String,
}

impl Server {
    fn start() -> Self {
        let mut child = bitnet()
            .args(["serve", "--port", "0", "--threads", "1", "--log-format", "json"])
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut log = BufReader::new(child.stderr.take().expect("piped"));
        let mut line = String::new();
        while !line.contains("listening on") {
            line.clear();
            assert_ne!(log.read_line(&mut line).expect("a log"), 0, "the server ended early");
        }
        let at = line.find("http://").expect("an address");
        let url = line[at..].split(['"', ' ']).next().expect("a word").to_owned();
        // Read on, so that the server never waits for the pipe.
        std::thread::spawn(move || for _ in log.lines() {});
        Self { child, url }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn both_loops_measure_what_the_server_counts() {
    let server = Server::start();
    let base = [
        "bench-serve",
        "--url",
        &server.url,
        "-n",
        "6",
        "--tokens",
        "5",
        "--words",
        "10",
        "--json",
    ];
    let run = |extra: &[&str]| json(&[&base[..], extra].concat());

    let report = run(&["-c", "1,3", "--slo", "ttft=600000,e2e=0.0001"]);
    assert_eq!(report["model"], "builtin");
    let runs = report["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 2);
    for (run, concurrency) in runs.iter().zip([1, 3]) {
        assert_eq!((&run["completed"], &run["failed"]), (&6.into(), &0.into()));
        assert_eq!(run["output_tokens_mean"], 5.0);
        assert_eq!(run["goodput_per_second"], 0.0, "nothing ends within a tenth of a microsecond");
        assert!(run["peak_concurrency"].as_u64().unwrap() <= concurrency);
        for metric in ["ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"] {
            let p = |name: &str| run[metric][name].as_f64().unwrap();
            assert!(p("p50") > 0.0 && p("p50") <= p("p99") && p("p99") <= p("max"), "{metric}");
        }
        assert!(run["ttft_ms"]["p50"].as_f64() < run["e2e_ms"]["p50"].as_f64());
        assert_eq!(run["tpot_ms"]["count"], 6);
    }
    let report = run(&["--rate", "200", "--endpoint", "completions", "--shared-words", "60"]);
    let run = &report["runs"][0];
    assert_eq!((&run["completed"], &run["arrivals_per_second"]), (&6.into(), &200.0.into()));
    assert!(run["cached_tokens_mean"].as_f64().unwrap() > 0.0, "the shared words are known");

    let table =
        stdout(&["bench-serve", "--url", &server.url, "-n", "2", "--tokens", "3", "-c", "2"]);
    for part in ["2 at a time: 2 answered, 0 failed", "TTFT", "TPOT", "ITL", "E2E"] {
        assert!(table.contains(part), "{part} in {table}");
    }
    let (code, message) = failure(&["bench-serve", "--url", &server.url, "-m", "none"]);
    assert_eq!(code, 1);
    assert!(message.contains("404") && message.contains("none"), "{message}");
}

#[test]
fn what_cannot_be_measured_is_said() {
    let (code, message) = failure(&["bench-serve", "--url", "http://127.0.0.1:1"]);
    assert_eq!(code, 1);
    assert!(message.contains("cannot reach http://127.0.0.1:1"), "{message}");
    for wrong in [
        &["--url", "https://localhost"][..],
        &["--rate", "0"],
        &["--concurrency", "0"],
        &["-n", "0"],
        &["--spread", "2"],
        &["--slo", "speed=1"],
        &["--rate", "1", "-c", "2"],
    ] {
        let mut args = vec!["bench-serve", "--url", "http://127.0.0.1:1", "-m", "x"];
        if wrong[0] == "--url" {
            args = vec!["bench-serve"];
        }
        assert_eq!(failure(&[&args[..], wrong].concat()).0, 2, "{wrong:?}");
    }
}
