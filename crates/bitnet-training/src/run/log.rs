//! The log of a run: a CSV file with a row for each step, and a file of JSON lines with everything.
//!
//! A run that goes on from a checkpoint takes back what was logged after it, and lines cut by a crash,
//! so that a log never holds a step twice.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use bitnet_quant::convert::NewFile;
use serde::Serialize;
use serde_json::Value;

use super::{Line, Measured, Sampled};
use crate::error::{Error, Result};

/// Names of the CSV file's columns.
pub(super) const COLUMNS: &str =
    "step,tokens,seconds,loss,extra_loss,grad_norm,rate,tokens_per_second,bits_per_byte";
const CSV: &str = "log.csv";
const JSON: &str = "log.jsonl";

/// Open log files.
pub(super) struct Log {
    folder: PathBuf,
    csv: BufWriter<File>,
    json: BufWriter<File>,
    /// Lines of the JSON log about the step the run goes on from.
    known: HashSet<String>,
}

/// A line of the JSON log.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
enum Entry<'a> {
    Step(&'a Line),
    Eval(&'a Measured),
    Sample(&'a Sampled),
}

impl Log {
    /// Opens the log in `folder`, without what comes after `step`.
    pub(super) fn open(folder: &Path, step: u64) -> Result<Self> {
        let (csv, json) = (folder.join(CSV), folder.join(JSON));
        keep(&csv, |line| {
            let cells: Vec<&str> = line.split(',').collect();
            let whole = cells.len() == COLUMNS.split(',').count();
            line == COLUMNS || whole && cells[0].parse::<u64>().is_ok_and(|at| at <= step)
        })?;
        let mut known = HashSet::new();
        keep(&json, |line| {
            let value: Option<Value> = serde_json::from_str(line).ok();
            let at = value.and_then(|value| value["step"].as_u64());
            if at == Some(step) {
                known.insert(line.to_owned());
            }
            at.is_some_and(|at| at <= step)
        })?;
        let append = |path: &Path| {
            let file = OpenOptions::new().create(true).append(true).open(path);
            file.map(BufWriter::new).map_err(|error| Error::io(path, "open", error))
        };
        let new = fs::metadata(&csv).map_or(true, |metadata| metadata.len() == 0);
        let (csv, json) = (append(&csv)?, append(&json)?);
        let mut log = Self { folder: folder.to_owned(), csv, json, known };
        if new {
            log.csv_line(COLUMNS)?;
        }
        Ok(log)
    }

    /// Logs a step, and what was measured after it.
    pub(super) fn step(&mut self, line: &Line, measured: Option<&Measured>) -> Result<()> {
        let Line { step, tokens, seconds, loss, extra_loss, grad_norm, rate, .. } = line;
        let bits = measured.map(|m| format!("{:.5}", m.bits_per_byte)).unwrap_or_default();
        let speed = line.tokens_per_second;
        self.csv_line(&format!(
            "{step},{tokens},{seconds:.2},{loss:.6},{extra_loss:.6},{grad_norm:.5},{rate:.4e},{speed:.1},{bits}"
        ))?;
        self.json_line(&Entry::Step(line))?;
        match measured {
            Some(measured) => self.measured(measured),
            None => Ok(()),
        }
    }

    /// Logs what was measured after the last step.
    pub(super) fn measured(&mut self, measured: &Measured) -> Result<()> {
        self.json_line(&Entry::Eval(measured))
    }

    /// Logs a continuation.
    pub(super) fn sample(&mut self, sample: &Sampled) -> Result<()> {
        self.json_line(&Entry::Sample(sample))
    }

    /// Brings everything to the files.
    pub(super) fn flush(&mut self) -> Result<()> {
        let failed = |error| Error::io(self.folder.join(CSV), "write", error);
        self.csv.flush().and_then(|()| self.json.flush()).map_err(failed)
    }

    fn csv_line(&mut self, line: &str) -> Result<()> {
        let failed = |error| Error::io(self.folder.join(CSV), "write", error);
        writeln!(self.csv, "{line}").map_err(failed)
    }

    fn json_line(&mut self, entry: &Entry<'_>) -> Result<()> {
        let failed = |error| Error::io(self.folder.join(JSON), "write", error);
        let text = serde_json::to_string(entry).map_err(Error::json)?;
        // A run that had ended, and goes on to end once more, looks at the same model again.
        if self.known.contains(&text) {
            return Ok(());
        }
        writeln!(self.json, "{text}").map_err(failed)
    }
}

/// Rewrites a file with those of its lines that `wanted` likes.
fn keep(path: &Path, mut wanted: impl FnMut(&str) -> bool) -> Result<()> {
    let file = match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        file => file.map_err(|error| Error::io(path, "open", error))?,
    };
    let mut new = NewFile::create(path, true)?;
    for line in BufReader::new(file).lines() {
        // A line cut by a crash is no line.
        let Ok(line) = line else { break };
        if wanted(&line) {
            new.write(format!("{line}\n").as_bytes())?;
        }
    }
    Ok(new.commit()?)
}

/// A row of the CSV file as a plot needs it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Row {
    pub(super) tokens: f64,
    pub(super) loss: f64,
    pub(super) bits_per_byte: Option<f64>,
}

/// The rows of a folder's CSV file.
pub(super) fn rows(folder: &Path) -> Result<Vec<Row>> {
    let path = folder.join(CSV);
    let file = File::open(&path).map_err(|error| Error::io(&path, "open", error))?;
    let lines = BufReader::new(file).lines();
    let row = |line: std::io::Result<String>| {
        let line = line.ok()?;
        let cells: Vec<&str> = line.split(',').collect();
        let number = |column: usize| cells.get(column)?.parse::<f64>().ok();
        Some(Row { tokens: number(1)?, loss: number(3)?, bits_per_byte: number(8) })
    };
    Ok(lines.filter_map(row).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: u64) -> Line {
        Line {
            step,
            tokens: step * 100,
            seconds: step as f64,
            loss: 5.0 - step as f64 / 10.0,
            extra_loss: 0.0,
            grad_norm: 1.0,
            rate: 1e-3,
            tokens_per_second: 100.0,
            progress: 0.5,
        }
    }

    #[test]
    fn a_resumed_log_holds_each_step_once() {
        let folder = tempfile::tempdir().unwrap();
        let measured = Measured {
            step: 2,
            bits_per_byte: 1.5,
            nats_per_token: 4.0,
            window: 8,
            tokens: 9,
            bytes: 20,
        };
        let mut log = Log::open(folder.path(), 0).unwrap();
        for step in 1..=5 {
            log.step(&line(step), (step == 2).then_some(&measured)).unwrap();
        }
        log.flush().unwrap();
        let mut log = Log::open(folder.path(), 3).unwrap();
        log.step(&line(4), None).unwrap();
        log.flush().unwrap();
        let csv = fs::read_to_string(folder.path().join(CSV)).unwrap();
        assert_eq!(csv.lines().next(), Some(COLUMNS));
        let steps: Vec<&str> = csv.lines().skip(1).map(|l| l.split(',').next().unwrap()).collect();
        assert_eq!(steps, ["1", "2", "3", "4"]);
        let json = fs::read_to_string(folder.path().join(JSON)).unwrap();
        assert_eq!(json.lines().count(), 5, "four steps and what was measured");
        let rows = rows(folder.path()).unwrap();
        assert_eq!(rows[1], Row { tokens: 200.0, loss: 4.8, bits_per_byte: Some(1.5) });
        assert_eq!(rows.len(), 4);
    }

    #[test]
    fn lines_cut_by_a_crash_are_no_lines() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = Log::open(folder.path(), 0).unwrap();
        log.step(&line(1), None).unwrap();
        log.flush().unwrap();
        let path = folder.path().join(CSV);
        let whole = fs::read_to_string(&path).unwrap();
        let cut = whole.lines().nth(1).unwrap();
        let cut = &cut[..cut.len() - 9]; // in its last cells
        fs::write(&path, format!("{whole}nonsense\n{cut}")).unwrap();
        let mut log = Log::open(folder.path(), 1).unwrap();
        log.step(&line(2), None).unwrap();
        log.flush().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 3);
        assert_eq!(rows(folder.path()).unwrap().len(), 2);
    }

    #[test]
    fn what_is_seen_again_is_logged_once() {
        let folder = tempfile::tempdir().unwrap();
        let sample = |text: &str| Sampled { step: 2, prompt: "The".into(), text: text.into() };
        for texts in [&["fox", "hen"][..], &["fox", "owl"]] {
            let mut log = Log::open(folder.path(), 2).unwrap();
            texts.iter().for_each(|text| log.sample(&sample(text)).unwrap());
            log.flush().unwrap();
        }
        let json = fs::read_to_string(folder.path().join(JSON)).unwrap();
        assert_eq!(json.lines().count(), 3, "{json}");
    }
}
