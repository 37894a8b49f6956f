//! `bitnet serve` as a process: ports that are taken, few file descriptors, signals.
#![cfg(unix)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{bitnet, failure};

/// A server on a port of the system's choice, ended with the test.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the program starts");
        let mut log = BufReader::new(child.stderr.take().expect("piped"));
        let mut line = String::new();
        while !line.contains("listening on") {
            line.clear();
            assert_ne!(log.read_line(&mut line).expect("a log"), 0, "the server ended early");
        }
        let at = line.find("http://").expect("an address") + "http://".len();
        let address = line[at..].split(['"', ' ']).next().expect("a word").to_owned();
        // Read on, so that the server never waits for the pipe.
        std::thread::spawn(move || for _ in log.lines() {});
        Self { child, address }
    }

    fn serve(args: &[&str]) -> Self {
        Self::start(bitnet().args(["serve", "--port", "0", "--log-format", "json"]).args(args))
    }

    /// The head and body of an answer; empty if the server hung up.
    fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(&self.address).expect("a connection");
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let head = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        let mut answer = String::new();
        let _ = stream.write_all(head.as_bytes());
        let _ = stream.read_to_string(&mut answer);
        answer
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_port_in_use_is_said() {
    let server = Server::serve(&[]);
    let port = server.address.rsplit(':').next().unwrap();
    let (code, stderr) = failure(&["serve", "--port", port]);
    assert!(code == 1 && stderr.contains("cannot listen"), "{code} {stderr}");
    assert!(server.get("/health").starts_with("HTTP/1.1 200"), "the first one goes on");
}

#[test]
fn a_lack_of_file_descriptors_passes() {
    let limited = format!(
        "ulimit -n 32; exec {} serve --port 0 --log-format json",
        env!("CARGO_BIN_EXE_bitnet")
    );
    let server = Server::start(Command::new("sh").args(["-c", &limited]));
    let crowd: Vec<TcpStream> = (0..60)
        .map(|_| TcpStream::connect(&server.address).expect("the backlog has room"))
        .collect();
    std::thread::sleep(Duration::from_millis(500));
    drop(crowd);
    assert!(server.get("/health").starts_with("HTTP/1.1 200"));
    assert!(server.get("/v1/models").contains("builtin"));
}

#[test]
fn a_signal_ends_it_and_a_killed_one_starts_again() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("bitnet.sock");
    let start = || {
        let mut child = bitnet()
            .args(["serve", "--unix", socket.to_str().unwrap(), "--log-format", "json"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("listening on") {
            line.clear();
            assert_ne!(log.read_line(&mut line).unwrap(), 0, "the server ended early");
        }
        std::thread::spawn(move || for _ in log.lines() {});
        Server { child, address: String::new() }
    };
    // Killed, it leaves its socket behind, which is no hindrance.
    drop(start());
    assert!(socket.exists());
    let mut server = start();
    server.signal("TERM");
    assert!(server.child.wait().unwrap().success());
    assert!(!socket.exists());
}
