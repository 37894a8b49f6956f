//! `bitnet bench`: what it prints, for people and for programs.

mod common;

use common::{failure, json, stdout};

/// The least work that still measures a prompt and a generation.
const SHORT: [&str; 10] = ["bench", "-p", "8", "-n", "4", "-d", "0,6", "-r", "2", "--quiet"];

#[test]
fn json_holds_every_combination_with_its_share_of_the_limit() {
    let args = [&SHORT[..], &["-b", "1,3", "-t", "1,2", "--json"]].concat();
    let record = json(&args);
    let results = record["results"].as_array().expect("results");
    let names: Vec<_> = results.iter().map(|r| r["test"].as_str().expect("a name")).collect();
    let tests = ["pp8", "tg4", "tg4 x3", "pp8 @ d6", "tg4 @ d6", "tg4 x3 @ d6"];
    assert_eq!(names, [tests, tests].concat());
    for row in results {
        let rate = row["tok_per_s"].as_f64().expect("a rate");
        let limit = row["limit_tok_per_s"].as_f64().expect("a limit");
        let share = row["share_of_limit"].as_f64().expect("a share");
        assert!(rate > 0.0 && limit > 0.0, "{row}");
        assert!((share - rate / limit).abs() < 1e-9, "{row}");
        assert_eq!(row["samples"].as_array().map(Vec::len), Some(2));
        assert!(row["stddev"].as_f64().is_some_and(|deviation| deviation >= 0.0));
    }
    for (run, threads) in record["runs"].as_array().expect("runs").iter().zip([1, 2]) {
        assert_eq!(run["threads"], threads);
        assert!(run["read_gb_per_s"].as_f64() > Some(0.1), "{run}");
        assert!(run["mac_g_per_s"].as_f64() > Some(0.1), "{run}");
        assert!(run["first_token_s"].as_f64() >= run["load_s"].as_f64(), "{run}");
    }
    assert_eq!(record["model"], "builtin");
}

#[test]
fn tables_go_to_standard_output() {
    let table = stdout(&[&SHORT[..], &["-t", "1"]].concat());
    assert!(table.lines().any(|line| line.starts_with("tg4 @ d6")), "{table}");
    let csv = stdout(&[&SHORT[..], &["-t", "1", "-o", "csv"]].concat());
    assert_eq!(csv.lines().count(), 1 + 4, "{csv}");
}

#[test]
fn small_work_is_measured_through_the_engine() {
    let record = json(&["bench", "--small", "-r", "1", "-t", "1", "--json", "--quiet"]);
    assert!(record["results"][0]["ops_per_s"].as_f64() > Some(100.0), "{record}");
    let engine = &record["results"][1];
    let ms = |percentile: &str| engine[percentile].as_f64().expect("a time");
    assert!(ms("token_p50_ms") <= ms("token_p99_ms") && ms("token_p99_ms") > 0.0, "{record}");
}

#[test]
fn nonsense_is_refused_with_what_was_expected() {
    let nothing = failure(&["bench", "-p", "0", "-n", "0"]);
    assert!(nothing.0 == 2 && nothing.1.contains("-p or -n"), "{nothing:?}");
    let nobody = failure(&["bench", "-b", "0"]);
    assert!(nobody.0 == 2 && nobody.1.contains("sequences"), "{nobody:?}");
    let shape = failure(&["bench", "--synthetic", "7b"]);
    assert!(shape.0 == 2 && shape.1.contains("2b4t"), "{shape:?}");
    let both = failure(&["bench", "--synthetic", "2b4t", "-m", "builtin"]);
    assert_eq!(both.0, 2);
    let format = failure(&["bench", "--small", "-o", "csv"]);
    assert!(format.0 == 2 && format.1.contains("json"), "{format:?}");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("there.gguf");
    std::fs::write(&path, "mine").expect("a file");
    let path = path.to_str().expect("UTF-8");
    let exists = failure(&["bench", "--synthetic", "2b4t", "--write-gguf", path]);
    assert_eq!(exists.0, 1);
    assert_eq!(std::fs::read(path).expect("the file"), b"mine");
}
