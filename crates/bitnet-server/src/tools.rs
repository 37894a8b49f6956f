//! Tool calls inside generated text: found as it streams, with arguments passed on as they come.
//!
//! Two forms are understood. `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number of
//! times among text, is what models without a form of their own are asked for. An answer that is one
//! such object and nothing else is what a forced call is constrained to, and what some models write
//! by themselves. Anything that turns out not to be a call of a known tool is text after all.

use std::collections::HashSet;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
/// Longest text held back while it may still become a call's head; the arguments are not held.
const MAX_HEAD_BYTES: usize = 4096;

/// What the scanner found in the text so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ToolEvent {
    /// Text that is no call.
    Text(String),
    /// A call begins; its arguments follow.
    Call {
        /// Calls are numbered from 0.
        index: usize,
        /// The tool's name.
        name: String,
    },
    /// More of a call's arguments, a piece of JSON text.
    Arguments {
        /// Which call.
        index: usize,
        /// The piece.
        delta: String,
    },
}

/// Finds calls in one answer.
#[derive(Debug)]
pub(crate) struct ToolScanner {
    names: HashSet<String>,
    max_calls: usize,
    n_calls: usize,
    state: State,
    /// Text not yet decided about.
    pending: String,
}

#[derive(Debug)]
enum State {
    /// Nothing but white space so far: the answer may be a bare object.
    Start,
    /// In text.
    Text,
    /// In a call; with the tag before it and the white space before that, or nothing if bare.
    Call(CallObject, String),
    /// After a call's object, before its `</tool_call>`.
    AfterCall,
    /// After a bare object: only white space is expected, and dropped.
    AfterBare,
}

impl ToolScanner {
    /// Looks for calls of tools with these names, at most `max_calls`.
    pub(crate) fn new(names: impl IntoIterator<Item = String>, max_calls: usize) -> Self {
        let names: HashSet<String> = names.into_iter().collect();
        // Without tools nothing is a call, and no text is held back.
        let (state, max_calls) = match names.is_empty() {
            true => (State::Text, 0),
            false => (State::Start, max_calls),
        };
        Self { names, max_calls, n_calls: 0, state, pending: String::new() }
    }

    /// Calls found so far.
    pub(crate) fn n_calls(&self) -> usize {
        self.n_calls
    }

    /// Takes more text.
    pub(crate) fn push(&mut self, text: &str, out: &mut Vec<ToolEvent>) {
        self.pending.push_str(text);
        while self.advance(out) {}
    }

    /// The answer has ended: what was held back is text.
    pub(crate) fn finish(&mut self, out: &mut Vec<ToolEvent>) {
        match std::mem::replace(&mut self.state, State::Text) {
            State::Call(call, lead) if !call.announced => self.give_up(call, lead, out),
            State::Start | State::Text => {}
            // A call that was cut off has been passed on as far as it went.
            State::Call(..) | State::AfterCall | State::AfterBare => self.pending.clear(),
        }
        emit_text(std::mem::take(&mut self.pending), out);
    }

    /// One transition; false if more text is needed.
    fn advance(&mut self, out: &mut Vec<ToolEvent>) -> bool {
        match std::mem::replace(&mut self.state, State::Text) {
            State::Start => {
                let Some(first) = self.pending.find(|c: char| !c.is_whitespace()) else {
                    self.state = State::Start;
                    return false;
                };
                if self.pending[first..].starts_with('{') && self.n_calls < self.max_calls {
                    self.pending.drain(..first);
                    self.state = State::Call(CallObject::default(), String::new());
                }
                true
            }
            State::Text => self.scan_text(out),
            State::Call(call, lead) => self.scan_call(call, lead, out),
            State::AfterCall => {
                let rest = self.pending.trim_start();
                if rest.is_empty() || (CLOSE.starts_with(rest) && rest != CLOSE) {
                    self.state = State::AfterCall;
                    return false;
                }
                let close = rest.strip_prefix(CLOSE).unwrap_or(rest).trim_start_matches('\n');
                self.pending = close.to_owned();
                true
            }
            State::AfterBare => {
                if self.pending.trim().is_empty() {
                    self.pending.clear();
                    self.state = State::AfterBare;
                    return false;
                }
                true
            }
        }
    }

    fn scan_text(&mut self, out: &mut Vec<ToolEvent>) -> bool {
        self.state = State::Text;
        if self.n_calls >= self.max_calls {
            emit_text(std::mem::take(&mut self.pending), out);
            return false;
        }
        if let Some(at) = self.pending.find(OPEN) {
            // The line break before a tag belongs to the tag.
            let end_of_text = self.pending[..at].trim_end().len();
            let rest = self.pending.split_off(at + OPEN.len());
            let lead = self.pending.split_off(end_of_text);
            emit_text(std::mem::replace(&mut self.pending, rest), out);
            self.state = State::Call(CallObject::default(), lead);
            return true;
        }
        let held = held_back(&self.pending);
        let certain = self.pending.len() - held;
        emit_text(self.pending.drain(..certain).collect(), out);
        false
    }

    fn scan_call(&mut self, mut call: CallObject, lead: String, out: &mut Vec<ToolEvent>) -> bool {
        if call.text.is_empty() {
            let start = self.pending.len() - self.pending.trim_start().len();
            self.pending.drain(..start);
        }
        match call.push(&mut self.pending, self.n_calls, &self.names, out) {
            Scan::More => {
                self.state = State::Call(call, lead);
                false
            }
            Scan::Done => {
                self.n_calls += 1;
                self.state = if lead.is_empty() { State::AfterBare } else { State::AfterCall };
                true
            }
            Scan::NoCall => {
                self.give_up(call, lead, out);
                true
            }
        }
    }

    /// What was taken for a call is text.
    fn give_up(&mut self, call: CallObject, lead: String, out: &mut Vec<ToolEvent>) {
        emit_text(lead + &call.text, out);
        self.state = State::Text;
    }
}

/// Bytes at the end of `text` that may be the start of a tag, with the white space before them.
fn held_back(text: &str) -> usize {
    let longest = (1..OPEN.len()).rev().find(|&n| text.ends_with(&OPEN[..n])).unwrap_or(0);
    let before = &text[..text.len() - longest];
    longest + before.len() - before.trim_end().len()
}

fn emit_text(text: String, out: &mut Vec<ToolEvent>) {
    match out.last_mut() {
        _ if text.is_empty() => {}
        Some(ToolEvent::Text(last)) => last.push_str(&text),
        _ => out.push(ToolEvent::Text(text)),
    }
}

enum Scan {
    /// The object goes on.
    More,
    /// It has ended and was a call.
    Done,
    /// It is no call of a known tool.
    NoCall,
}

/// `{"name": …, "arguments": {…}}`, read byte by byte.
#[derive(Debug, Default)]
struct CallObject {
    /// All of it so far.
    text: String,
    scanned: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
    /// Where the string being read begins, at depth 1.
    string_start: usize,
    /// The last string at depth 1 that may be a key.
    last_string: Option<String>,
    key: Option<String>,
    name: Option<String>,
    /// Where the arguments begin, and end if they have.
    arguments: Option<(usize, Option<usize>)>,
    sent: usize,
    announced: bool,
}

impl CallObject {
    fn push(
        &mut self,
        input: &mut String,
        index: usize,
        names: &HashSet<String>,
        out: &mut Vec<ToolEvent>,
    ) -> Scan {
        self.text.push_str(input);
        input.clear();
        while self.scanned < self.text.len() {
            let at = self.scanned;
            self.scanned += 1;
            if !self.take(at, self.text.as_bytes()[at]) {
                return Scan::NoCall;
            }
            if self.name.as_ref().is_some_and(|name| !names.contains(name)) {
                return Scan::NoCall;
            }
            if self.depth == 0 {
                // The object has ended; what follows belongs to somebody else.
                *input = self.text.split_off(self.scanned);
                if self.name.is_none() {
                    return Scan::NoCall;
                }
                self.send(index, out);
                if self.arguments.is_none() {
                    out.push(ToolEvent::Arguments { index, delta: "{}".into() });
                }
                return Scan::Done;
            }
        }
        self.send(index, out);
        let endless = !self.announced && self.text.len() > MAX_HEAD_BYTES;
        if endless { Scan::NoCall } else { Scan::More }
    }

    /// Takes the byte at `at`; false if this cannot be a call.
    fn take(&mut self, at: usize, byte: u8) -> bool {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => {
                    self.in_string = false;
                    if self.depth == 1 {
                        return self.end_string(at);
                    }
                }
                _ => {}
            }
            return true;
        }
        match byte {
            b'"' => {
                self.in_string = true;
                self.string_start = at;
            }
            b'{' | b'[' => {
                if self.depth == 1 {
                    match self.key.as_deref() {
                        Some("arguments" | "parameters") if byte == b'{' => {
                            self.arguments.get_or_insert((at, None));
                        }
                        _ => return false,
                    }
                }
                self.depth += 1;
            }
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                if self.depth == 1
                    && let Some((_, end @ None)) = &mut self.arguments
                {
                    *end = Some(at + 1);
                }
            }
            b':' if self.depth == 1 => self.key = self.last_string.take(),
            b',' if self.depth == 1 => self.key = None,
            _ => {}
        }
        true
    }

    fn end_string(&mut self, at: usize) -> bool {
        let Ok(text) = serde_json::from_str::<String>(&self.text[self.string_start..=at]) else {
            return false;
        };
        match self.key.as_deref() {
            None => self.last_string = Some(text),
            Some("name") => self.name = Some(text),
            // Some models add a type; anything else is not a call.
            Some("type" | "id") => {}
            Some(_) => return false,
        }
        true
    }

    /// Passes on what is known: the name once, then the arguments as far as they go.
    fn send(&mut self, index: usize, out: &mut Vec<ToolEvent>) {
        let Some(name) = &self.name else { return };
        if !self.announced {
            out.push(ToolEvent::Call { index, name: name.clone() });
            self.announced = true;
        }
        let Some((start, end)) = self.arguments else { return };
        let end = end.unwrap_or(self.scanned);
        let from = start + self.sent;
        if end > from {
            let delta = self.text[from..end].to_owned();
            self.sent += delta.len();
            out.push(ToolEvent::Arguments { index, delta });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scans `text` in pieces of `step` characters; returns text and calls.
    fn scan(text: &str, step: usize, max_calls: usize) -> (String, Vec<(String, String)>) {
        let names = ["get_weather", "add"].map(String::from);
        let mut scanner = ToolScanner::new(names, max_calls);
        let mut events = Vec::new();
        let letters: Vec<char> = text.chars().collect();
        for piece in letters.chunks(step) {
            scanner.push(&piece.iter().collect::<String>(), &mut events);
        }
        scanner.finish(&mut events);
        let (mut text, mut calls) = (String::new(), Vec::new());
        for event in events {
            match event {
                ToolEvent::Text(more) => text.push_str(&more),
                ToolEvent::Call { index, name } => {
                    assert_eq!(index, calls.len());
                    calls.push((name, String::new()));
                }
                ToolEvent::Arguments { index, delta } => calls[index].1.push_str(&delta),
            }
        }
        assert_eq!(scanner.n_calls().max(calls.len()), calls.len());
        (text, calls)
    }

    fn call(name: &str, arguments: &str) -> (String, String) {
        (name.into(), arguments.into())
    }

    #[test]
    fn calls_are_found_however_the_text_is_cut() {
        let weather =
            || call("get_weather", r#"{"city": "Ö\"}{ </tool_call>", "n": [1, {"a": 2}]}"#);
        let cases = [
            (
                "Just text with < and <tool and {\"name\": 1}.",
                9,
                "Just text with < and <tool and {\"name\": 1}.",
                vec![],
            ),
            (
                "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Ö\\\"}{ </tool_call>\", \"n\": [1, {\"a\": 2}]}}\n</tool_call>",
                9,
                "",
                vec![weather()],
            ),
            (
                "Let me see.\n<tool_call>{\"arguments\": {\"a\": 1}, \"name\": \"add\"}</tool_call>\n<tool_call>{\"name\":\"add\",\"arguments\":{}}</tool_call>",
                9,
                "Let me see.",
                vec![call("add", r#"{"a": 1}"#), call("add", "{}")],
            ),
            (
                " {\"name\": \"add\", \"parameters\": {\"b\": null}} \n",
                9,
                "",
                vec![call("add", r#"{"b": null}"#)],
            ),
            ("{\"name\": \"add\"}", 9, "", vec![call("add", "{}")]),
            (
                "{\"name\": \"rm\", \"arguments\": {}}",
                9,
                "{\"name\": \"rm\", \"arguments\": {}}",
                vec![],
            ),
            ("{\"city\": \"Rome\"}", 9, "{\"city\": \"Rome\"}", vec![]),
            ("<tool_call>nonsense</tool_call>", 9, "<tool_call>nonsense</tool_call>", vec![]),
            ("a <tool_call>{\"name\"", 9, "a <tool_call>{\"name\"", vec![]),
            (
                "<tool_call>{\"name\":\"add\",\"arguments\":{\"a\":",
                9,
                "",
                vec![call("add", "{\"a\":")],
            ),
            (
                "<tool_call>{\"name\":\"add\",\"arguments\":{}}</tool_call><tool_call>{\"name\":\"add\",\"arguments\":{}}</tool_call>",
                1,
                "<tool_call>{\"name\":\"add\",\"arguments\":{}}</tool_call>",
                vec![call("add", "{}")],
            ),
        ];
        for (text, max_calls, expected_text, expected_calls) in cases {
            for step in [1, 2, 3, 7, 1000] {
                let (found, calls) = scan(text, step, max_calls);
                assert_eq!(found, expected_text, "{text:?} in steps of {step}");
                assert_eq!(calls, expected_calls, "{text:?} in steps of {step}");
            }
        }
    }

    #[test]
    fn arguments_are_passed_on_before_they_end() {
        let mut scanner = ToolScanner::new(["add".to_owned()], 1);
        let mut events = Vec::new();
        scanner.push("<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1", &mut events);
        let expected = [
            ToolEvent::Call { index: 0, name: "add".into() },
            ToolEvent::Arguments { index: 0, delta: "{\"a\": 1".into() },
        ];
        assert_eq!(events, expected);
    }

    #[test]
    fn what_cannot_become_a_call_is_not_held_for_ever() {
        let mut scanner = ToolScanner::new(["add".to_owned()], 1);
        let mut events = Vec::new();
        scanner.push(&format!("{{\"{}", "x".repeat(2 * MAX_HEAD_BYTES)), &mut events);
        assert!(matches!(&events[..], [ToolEvent::Text(text)] if text.len() > MAX_HEAD_BYTES));
    }
}
