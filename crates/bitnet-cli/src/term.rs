//! What a terminal shows: colours, notes, progress bars, and numbers as people write them.
//!
//! Colours and bars appear on a terminal only, and never where `NO_COLOR` is set. Standard output
//! carries results; everything said beside them goes to standard error.

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How much is said, and in what colours.
#[derive(Debug, Clone, Args)]
pub(crate) struct OutputArgs {
    /// Say more: kernel, threads, load time, memory
    #[arg(short, long, global = true, conflicts_with = "quiet")]
    pub(crate) verbose: bool,
    /// Say nothing beside results and errors
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// When to use colours [default: on a terminal, unless NO_COLOR is set]
    #[arg(
        long,
        global = true,
        value_name = "WHEN",
        default_value = "auto",
        hide_default_value = true
    )]
    pub(crate) color: When,
}

/// When to use colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum When {
    // Plain comments: documented values would spread all help over three lines an option.
    Auto,
    Always,
    Never,
}

/// What a piece of text is; decides its colour.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Style {
    /// What the user gave.
    Prompt,
    /// Names of things.
    Label,
    /// Beside the point.
    Note,
    Warning,
    Error,
}

impl Style {
    const fn code(self) -> &'static str {
        match self {
            Self::Prompt => "\x1b[36m",
            Self::Label => "\x1b[1m",
            Self::Note => "\x1b[2m",
            Self::Warning => "\x1b[33m",
            Self::Error => "\x1b[1;31m",
        }
    }
}

/// The terminal, or what stands in its place.
pub(crate) struct Term {
    color_out: bool,
    color_err: bool,
    verbose: bool,
    quiet: bool,
}

impl Term {
    /// Looks at the streams and the environment.
    pub(crate) fn new(args: &OutputArgs) -> Self {
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let plain = set("NO_COLOR") || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let color = |terminal: bool| match args.color {
            When::Auto => terminal && !plain,
            When::Always => true,
            When::Never => false,
        };
        Self {
            color_out: color(io::stdout().is_terminal()),
            color_err: color(io::stderr().is_terminal()),
            verbose: args.verbose,
            quiet: args.quiet,
        }
    }

    /// Text for standard output.
    pub(crate) fn out(&self, style: Style, text: impl AsRef<str>) -> String {
        paint(self.color_out, style, text.as_ref())
    }

    /// Text for standard error.
    pub(crate) fn err(&self, style: Style, text: impl AsRef<str>) -> String {
        paint(self.color_err, style, text.as_ref())
    }

    /// Whether standard output gets colours.
    pub(crate) fn has_color(&self) -> bool {
        self.color_out
    }

    /// Whether details are wanted.
    pub(crate) fn is_verbose(&self) -> bool {
        self.verbose
    }

    /// A line beside the result.
    pub(crate) fn note(&self, text: &str) {
        if !self.quiet {
            say(&self.err(Style::Note, printable(text)));
        }
    }

    /// A line for those who asked for details.
    pub(crate) fn detail(&self, text: &str) {
        if self.verbose {
            say(&self.err(Style::Note, printable(text)));
        }
    }

    /// Something that was not done as asked.
    pub(crate) fn warn(&self, text: &str) {
        if !self.quiet {
            say(&format!("{} {}", self.err(Style::Warning, "warning:"), printable(text)));
        }
    }

    /// Why the command failed.
    pub(crate) fn error(&self, text: &str) {
        say(&format!("{} {}", self.err(Style::Error, "error:"), printable(text)));
    }

    /// A bar over `length` units on standard error; invisible where that is no terminal.
    pub(crate) fn bar(&self, label: &str, length: u64, unit: Unit) -> ProgressBar {
        let target = match self.quiet {
            true => ProgressDrawTarget::hidden(),
            false => ProgressDrawTarget::stderr_with_hz(10),
        };
        let template = match unit {
            Unit::Items => "{prefix:.bold} {bar:32} {pos}/{len}  {msg}",
            Unit::Bytes => {
                "{prefix:.bold} {bar:32} {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {msg}"
            }
        };
        let style = ProgressStyle::with_template(template)
            .expect("the templates above are valid")
            .progress_chars("━╸─");
        let bar = ProgressBar::with_draw_target(Some(length), target).with_style(style);
        bar.set_prefix(label.to_owned());
        bar
    }
}

/// What a bar counts.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Unit {
    /// Layers, tensors, windows.
    Items,
    /// Bytes.
    Bytes,
}

/// Writes a line to standard error. If that is closed, there is nobody to tell.
fn say(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

fn paint(color: bool, style: Style, text: &str) -> String {
    match color {
        true => format!("{}{text}\x1b[0m", style.code()),
        false => text.to_owned(),
    }
}

/// Text without the control characters by which a model or a file could command a terminal.
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    let harmless = |c: char| !c.is_control() || c == '\n' || c == '\t';
    match text.chars().all(harmless) {
        true => text.into(),
        false => text.chars().map(|c| if harmless(c) { c } else { '\u{fffd}' }).collect(),
    }
}

/// `1234567` as `1,234,567`.
pub(crate) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A number of things: `1 tensor`, `1,234 tensors`.
pub(crate) fn counted(n: u64, thing: &str) -> String {
    format!("{} {thing}{}", count(n), if n == 1 { "" } else { "s" })
}

/// Bytes in the largest binary unit that keeps a whole digit.
pub(crate) fn bytes(n: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = "B";
    for larger in units {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    match unit {
        "B" => format!("{n} B"),
        _ => format!("{value:.1} {unit}"),
    }
}

/// A time in the unit that suits it.
pub(crate) fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    match seconds {
        s if s < 0.001 => format!("{:.0} µs", s * 1e6),
        s if s < 1.0 => format!("{:.1} ms", s * 1e3),
        s if s < 120.0 => format!("{s:.2} s"),
        s => format!("{} min {:.0} s", (s / 60.0) as u64, s % 60.0),
    }
}

/// A rate with three or four significant digits.
pub(crate) fn rate(per_second: f64) -> String {
    match per_second {
        r if r < 10.0 => format!("{r:.2}"),
        r if r < 1000.0 => format!("{r:.1}"),
        r => count(r.round() as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!([0, 999, 1000, 1_234_567].map(count), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([0, 1023, 1536, 3 << 30].map(bytes), ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]);
        let times = [15e-6, 0.0123, 3.5, 130.0].map(|s| duration(Duration::from_secs_f64(s)));
        assert_eq!(times, ["15 µs", "12.3 ms", "3.50 s", "2 min 10 s"]);
        assert_eq!([1.234, 38.5, 1234.5].map(rate), ["1.23", "38.5", "1,235"]);
    }

    #[test]
    fn text_cannot_command_the_terminal() {
        assert_eq!(printable("line\n\ttwo é"), "line\n\ttwo é");
        assert_eq!(printable("\x1b[2Jgone\u{9b}\r"), "\u{fffd}[2Jgone\u{fffd}\u{fffd}");
    }

    #[test]
    fn colour_only_where_wanted() {
        assert_eq!(paint(false, Style::Prompt, "x"), "x");
        assert_eq!(paint(true, Style::Prompt, "x"), "\x1b[36mx\x1b[0m");
    }
}
