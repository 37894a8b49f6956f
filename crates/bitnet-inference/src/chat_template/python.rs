//! What transformers adds to Jinja for chat templates: `raise_exception`, `strftime_now`, a
//! `tojson` without HTML escapes, and `{% generation %}` blocks.

use std::borrow::Cow;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State};

/// Deepest nesting and most bytes `tojson` writes.
const MAX_JSON_DEPTH: usize = 64;
const MAX_JSON_BYTES: usize = 1 << 24;

pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, "refused").with_source(Refusal(message)))
    });
    environment.add_function("strftime_now", |format: String| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        strftime(&format, now.as_secs())
    });
    environment.add_filter("tojson", to_json);
}

/// Most bytes a method may make, and most pieces it may cut a text into. Methods run outside the
/// engine's fuel; what they are given bounds what they make.
const MAX_METHOD_BYTES: u64 = 1 << 24;
const MAX_PIECES: u64 = 1 << 20;
/// Bytes that are read for one unit of fuel.
const BYTES_PER_FUEL: u64 = 1024;

/// Python's methods of texts, lists and maps, refused where they could make or search too much.
pub(super) fn call_method(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let own = size(value);
    let most = args.iter().map(size).max().unwrap_or(0);
    let too_much = match method {
        // The longest argument may be written once for every byte of the text.
        "replace" | "join" | "format" | "format_map" | "center" | "ljust" | "rjust" | "zfill"
        | "expandtabs" | "translate" => {
            (own + 1).saturating_mul(most.saturating_add(1)) > MAX_METHOD_BYTES
        }
        "split" | "rsplit" | "splitlines" => {
            let separator = args.first().and_then(Value::as_str).map_or(1, str::len).max(1);
            own / separator as u64 > MAX_PIECES
        }
        _ => false,
    };
    if too_much {
        return Err(Error::from(ErrorKind::OutOfFuel));
    }
    state.consume_fuel(own.saturating_add(most) / BYTES_PER_FUEL)?;
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

/// Bytes of a text, size of a number, or the sum over a list.
fn size(value: &Value) -> u64 {
    match value.kind() {
        ValueKind::String => value.as_str().map_or(0, |text| text.len() as u64),
        ValueKind::Number => value.as_i64().map_or(u64::MAX, i64::unsigned_abs),
        // A list's items may be long and many; their total counts.
        ValueKind::Seq | ValueKind::Iterable => match (value.len(), value.try_iter()) {
            (Some(length), Ok(items)) if length as u64 <= MAX_METHOD_BYTES => items
                .map(|item| 1 + item.as_str().map_or(0, str::len) as u64)
                .fold(0, u64::saturating_add),
            _ => u64::MAX,
        },
        _ => 1,
    }
}

/// The words of `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

/// The words of the `raise_exception` that caused this error.
pub(super) fn refusal(error: &Error) -> Option<String> {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        if let Some(Refusal(message)) = error.downcast_ref() {
            return Some(message.clone());
        }
        cause = error.source();
    }
    None
}

/// `{% generation %}` marks the assistant's words for training; it means nothing here.
pub(super) fn without_generation_tags(source: &str) -> Cow<'_, str> {
    if !source.contains("generation") {
        return Cow::Borrowed(source);
    }
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start + 2..].find("%}").map(|end| start + 2 + end) else { break };
        let tag = &rest[start + 2..end];
        let (open, close) = (tag.starts_with(['-', '+']), tag.ends_with(['-', '+']));
        let replacement = match tag.trim_matches(['-', '+']).trim() {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        out.push_str(&rest[..start + 2]);
        match replacement {
            Some(replacement) => {
                out.push_str(if open { &tag[..1] } else { "" });
                out.push_str(&format!(" {replacement} "));
                out.push_str(if close { &tag[tag.len() - 1..] } else { "" });
                out.push_str("%}");
                rest = &rest[end + 2..];
            }
            None => rest = &rest[start + 2..],
        }
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn to_json(value: Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(invalid("tojson: separators are a pair")),
        None => ((if indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned()),
    };
    let mut json = JsonWriter {
        out: String::new(),
        indent: indent.map(|indent| indent.min(32)),
        item,
        key,
        ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    json.write(&value, 0)?;
    Ok(Value::from(json.out))
}

fn invalid(reason: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}

struct JsonWriter {
    out: String,
    indent: Option<usize>,
    item: String,
    key: String,
    ascii: bool,
    sort: bool,
}

impl JsonWriter {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_JSON_DEPTH || self.out.len() > MAX_JSON_BYTES {
            return Err(invalid("tojson: the value is too deep or too long"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&value.to_string()),
            ValueKind::String => self.write_text(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                self.write_items('[', ']', value.try_iter()?.collect(), depth, |json, item| {
                    json.write(&item, depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort {
                    keys.sort();
                }
                self.write_items('{', '}', keys, depth, |json, name| {
                    json.write_text(&name.to_string());
                    let separator = json.key.clone();
                    json.out.push_str(&separator);
                    json.write(&value.get_item(&name)?, depth + 1)
                })?;
            }
            _ => return Err(invalid("tojson: the value is no JSON")),
        }
        Ok(())
    }

    fn write_items(
        &mut self,
        open: char,
        close: char,
        items: Vec<Value>,
        depth: usize,
        mut write: impl FnMut(&mut Self, Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        let is_empty = items.is_empty();
        for (i, item) in items.into_iter().enumerate() {
            if i > 0 {
                let separator = self.item.clone();
                self.out.push_str(&separator);
            }
            self.new_line(depth + 1);
            write(self, item)?;
        }
        if !is_empty {
            self.new_line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn write_text(&mut self, text: &str) {
        let quoted = serde_json::Value::from(text).to_string();
        if !self.ascii {
            self.out.push_str(&quoted);
            return;
        }
        for c in quoted.chars() {
            if c.is_ascii() {
                self.out.push(c);
            } else {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    self.out.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// The directives of C's `strftime` that templates use, in UTC; others are copied.
fn strftime(format: &str, seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let weekday = DAYS[((days + 4) % 7) as usize];
    let month_name = MONTHS[month as usize - 1];
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&format!("{:02}", year % 100)),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('e') => out.push_str(&format!("{day:2}")),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(weekday),
            Some('a') => out.push_str(&weekday[..3]),
            Some('H') => out.push_str(&format!("{hour:02}")),
            Some('I') => out.push_str(&format!("{:02}", (hour + 11) % 12 + 1)),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('M') => out.push_str(&format!("{minute:02}")),
            Some('S') => out.push_str(&format!("{:02}", second % 60)),
            Some('F') => out.push_str(&format!("{year}-{month:02}-{day:02}")),
            Some('T') => out.push_str(&format!("{hour:02}:{minute:02}:{:02}", second % 60)),
            Some('Z') => out.push_str("UTC"),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

/// Year, month and day of a number of days since 1970, in the Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    // Years that begin in March end with the leap day; eras of 400 years are all alike.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let all = "%Y-%m-%d %y %e %B %b %A %a %H:%M:%S %I %p %F %T %Z %% %q %";
        let at = |seconds| strftime(all, seconds);
        assert_eq!(
            at(0),
            "1970-01-01 70  1 January Jan Thursday Thu 00:00:00 12 AM 1970-01-01 00:00:00 UTC % %q %"
        );
        assert_eq!(strftime("%d %b %Y", 951_782_400), "29 Feb 2000");
        assert_eq!(strftime("%A %F %I %p", 4_107_542_399), "Sunday 2100-02-28 11 PM");
        assert_eq!(strftime("%F", 4_107_542_400), "2100-03-01");
        assert_eq!(strftime("%F %T", 1_735_689_599), "2024-12-31 23:59:59");
    }

    #[test]
    fn generation_tags_become_plain_blocks() {
        let cases = [
            ("{% generation %}a{% endgeneration %}", "{% if true %}a{% endif %}"),
            ("{%- generation -%}a{%-endgeneration%}", "{%- if true -%}a{%- endif %}"),
            ("{% if generation %}", "{% if generation %}"),
            ("{% set x = 'generation' %}{%", "{% set x = 'generation' %}{%"),
            ("é{% generation %}é", "é{% if true %}é"),
            ("{%}{% generation %}", "{%}{% if true %}"),
            ("{%%}{%-%}{% generation %}", "{%%}{%-%}{% if true %}"),
        ];
        for (source, expected) in cases {
            assert_eq!(without_generation_tags(source), expected);
        }
    }
}
