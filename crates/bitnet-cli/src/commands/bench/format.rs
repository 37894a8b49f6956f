//! A record as people and programs read it: table, markdown, CSV, JSON.

use std::io::{self, Write};

use super::record::{Record, Row, Run};
use crate::term::{bytes, count, duration};

const HEADINGS: [&str; 9] =
    ["test", "threads", "tok/s", "limit", "share", "bound by", "MB/token", "step p50 ms", "p99 ms"];

fn cells(row: &Row) -> [String; 9] {
    [
        row.test.clone(),
        row.threads.to_string(),
        format!("{:.2} ± {:.2}", row.tok_per_s, row.stddev),
        format!("{:.1}", row.limit_tok_per_s),
        format!("{:.1} %", row.share_of_limit * 100.0),
        row.limited_by.to_owned(),
        format!("{:.1}", row.bytes_per_token / 1e6),
        format!("{:.3}", row.step_p50_ms),
        format!("{:.3}", row.step_p99_ms),
    ]
}

/// Aligned columns under a few lines about the machine.
pub(crate) fn table(record: &Record, out: &mut impl Write) -> io::Result<()> {
    for (label, text) in about(record) {
        writeln!(out, "{label:<8} {text}")?;
    }
    let rows: Vec<_> = record.results.iter().map(cells).collect();
    let headings = HEADINGS.map(str::to_owned);
    let widths: [usize; 9] = std::array::from_fn(|column| {
        let all = rows.iter().chain([&headings]);
        all.map(|row| row[column].chars().count()).max().unwrap_or(0)
    });
    writeln!(out)?;
    for row in [&headings].into_iter().chain(&rows) {
        let aligned = row.iter().zip(widths).enumerate().map(|(column, (cell, width))| {
            // Words to the left, numbers to the right.
            if matches!(column, 0 | 5) {
                format!("{cell:<width$}")
            } else {
                format!("{cell:>width$}")
            }
        });
        writeln!(out, "{}", aligned.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}

/// The same as a document would show it.
pub(crate) fn markdown(record: &Record, out: &mut impl Write) -> io::Result<()> {
    for (label, text) in about(record) {
        writeln!(out, "- {label}: {text}")?;
    }
    writeln!(out, "\n| {} |", HEADINGS.join(" | "))?;
    let rule = |(column, _): (usize, _)| if matches!(column, 0 | 5) { "---" } else { "--:" };
    writeln!(out, "| {} |", HEADINGS.iter().enumerate().map(rule).collect::<Vec<_>>().join(" | "))?;
    for row in &record.results {
        writeln!(out, "| {} |", cells(row).join(" | "))?;
    }
    Ok(())
}

/// One object: `results`, `runs`, and the circumstances.
pub(crate) fn json(record: &Record, out: &mut impl Write) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, record)?;
    writeln!(out)
}

/// One line for each result, with its circumstances.
pub(crate) fn csv(record: &Record, out: &mut impl Write) -> io::Result<()> {
    writeln!(
        out,
        "date,version,commit,cpu,model,parameters,kv_cache,kernel,threads,read_gb_per_s,mac_g_per_s,\
         load_s,first_token_s,resident_bytes,peak_bytes,weight_bytes,test,sequences,depth,tok_per_s,\
         stddev,share_of_limit,limit_tok_per_s,limited_by,bytes_per_token,macs_per_token,ttft_ms,\
         step_p50_ms,step_p99_ms,other_load"
    )?;
    let optional = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
    let optional_bytes =
        |value: Option<u64>| value.map_or(String::new(), |value| value.to_string());
    for row in &record.results {
        // Every row was added together with the run of its threads.
        let Some(run) = record.runs.iter().find(|run| run.threads == row.threads) else { continue };
        let fields = [
            record.date.clone(),
            record.version.to_owned(),
            record.commit.to_owned(),
            quoted(&record.cpu),
            quoted(&record.model),
            record.parameters.to_string(),
            record.kv_cache.clone(),
            run.kernel.clone(),
            row.threads.to_string(),
            run.read_gb_per_s.to_string(),
            run.mac_g_per_s.to_string(),
            run.load_s.to_string(),
            run.first_token_s.to_string(),
            optional_bytes(run.resident_bytes),
            optional_bytes(run.peak_bytes),
            run.weight_bytes.to_string(),
            quoted(&row.test),
            row.sequences.to_string(),
            row.depth.to_string(),
            row.tok_per_s.to_string(),
            row.stddev.to_string(),
            row.share_of_limit.to_string(),
            row.limit_tok_per_s.to_string(),
            row.limited_by.to_owned(),
            row.bytes_per_token.to_string(),
            row.macs_per_token.to_string(),
            optional(row.ttft_ms),
            row.step_p50_ms.to_string(),
            row.step_p99_ms.to_string(),
            optional(row.other_load),
        ];
        writeln!(out, "{}", fields.join(","))?;
    }
    Ok(())
}

/// A CSV field that may hold commas and quotes.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('"', "\"\""))
}

/// The circumstances, as label and text.
fn about(record: &Record) -> Vec<(&'static str, String)> {
    let Record { model, parameters, cpu, kv_cache, version, commit, date, .. } = record;
    let built = if commit.is_empty() { String::new() } else { format!(" ({commit})") };
    let mut lines = vec![
        ("model", format!("{model}, {} parameters, {kv_cache} KV cache", count(*parameters))),
        ("cpu", cpu.clone()),
        ("bitnet", format!("{version}{built}, {date}")),
    ];
    lines.extend(record.runs.iter().map(|run| ("run", about_run(run))));
    lines
}

fn about_run(run: &Run) -> String {
    let seconds = |s: f64| duration(std::time::Duration::from_secs_f64(s));
    let mut text = format!(
        "{} threads, {}: reads {:.1} GB/s, multiplies {:.0} G/s; weights {}, loaded in {}, first token \
         after {}",
        run.threads,
        run.kernel,
        run.read_gb_per_s,
        run.mac_g_per_s,
        bytes(run.weight_bytes),
        seconds(run.load_s),
        seconds(run.first_token_s),
    );
    for (label, value) in [("resident", run.resident_bytes), ("peak", run.peak_bytes)] {
        if let Some(value) = value {
            text.push_str(&format!(", {label} {}", bytes(value)));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::example;
    use super::*;

    fn text(write: impl Fn(&Record, &mut Vec<u8>) -> io::Result<()>) -> String {
        let mut out = Vec::new();
        write(&example(), &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn json_has_the_results_first_and_by_their_names() {
        let text = text(json);
        assert!(text.trim_start().trim_start_matches('{').trim_start().starts_with("\"results\""));
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        let row = &value["results"][2];
        assert_eq!((&row["test"], &row["threads"]), (&"tg128".into(), &2.into()));
        assert_eq!(row["tok_per_s"], 70.0);
        assert_eq!(row["stddev"], 0.25);
        assert_eq!(row["share_of_limit"], 0.7);
        assert_eq!(value["runs"][1]["read_gb_per_s"], 62.0);
    }

    #[test]
    fn csv_lines_have_as_many_fields_as_the_heading() {
        let text = text(csv);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        let n_fields = lines[0].split(',').count();
        for line in &lines[1..] {
            let line = line.replace("\"A CPU, \"\"fast\"\"\"", "cpu");
            assert_eq!(line.split(',').count(), n_fields, "{line}");
        }
        assert!(lines[1].contains("4266.667") && lines[2].contains(",,20,25.5"), "{text}");
    }

    #[test]
    fn tables_align_and_markdown_is_a_table() {
        let table = text(table);
        let lines: Vec<_> = table.lines().skip_while(|line| !line.starts_with("test")).collect();
        assert_eq!(lines.len(), 4);
        let end = |line: &str| line.find('±').map(|at| line[..at].chars().count());
        assert_eq!(end(lines[2]), end(lines[3]), "{table}");
        assert!(table.contains("40.00 ± 0.25") && table.contains("80.0 %"), "{table}");
        let markdown = text(markdown);
        let rows: Vec<_> = markdown.lines().filter(|line| line.starts_with('|')).collect();
        assert_eq!(rows.len(), 2 + 3);
        assert!(rows.iter().all(|row| row.matches('|').count() == HEADINGS.len() + 1));
    }
}
