//! The commands of a chat, from `/help` to `/exit`. Parses; does nothing.

use std::path::PathBuf;

/// What a line that begins with `/` asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Slash {
    Help,
    /// Show the instructions, change them, or remove them (an empty text).
    System(Option<String>),
    Clear,
    Regenerate,
    Save(PathBuf),
    Load(PathBuf),
    /// Show all sampling options, or change one: name and value.
    Set(Option<(String, String)>),
    Stats,
    Exit,
}

/// Name, argument and meaning of every command, as `/help` shows them.
pub(crate) const COMMANDS: &[(&str, &str, &str)] = &[
    ("/help", "", "list these commands"),
    ("/system", "[TEXT | off]", "show, change or remove the instructions"),
    ("/clear", "", "forget the conversation; instructions and settings stay"),
    ("/regenerate", "", "answer the last question again"),
    ("/save", "FILE", "write the conversation as JSON"),
    ("/load", "FILE", "go on with a saved conversation"),
    ("/set", "[NAME VALUE]", "show or change sampling: /set temperature 0.7"),
    ("/stats", "", "tokens, speed and context used"),
    ("/exit", "", "leave, as Ctrl-D does"),
];

/// Understands a line that begins with `/`.
///
/// # Errors
/// What was expected instead.
pub(crate) fn parse(line: &str) -> Result<Slash, String> {
    let line = line.trim();
    let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let rest = rest.trim();
    let file = || match rest {
        "" => Err(format!("{name} expects a file name")),
        file => Ok(PathBuf::from(file)),
    };
    let alone = |command: Slash| match rest {
        "" => Ok(command),
        _ => Err(format!("{name} takes no argument, got '{rest}'")),
    };
    match name {
        "/help" | "/?" => alone(Slash::Help),
        "/system" => Ok(Slash::System(match rest {
            "" => None,
            "off" => Some(String::new()),
            text => Some(text.to_owned()),
        })),
        "/clear" => alone(Slash::Clear),
        "/regenerate" => alone(Slash::Regenerate),
        "/save" => file().map(Slash::Save),
        "/load" => file().map(Slash::Load),
        "/set" => match rest.split_once(char::is_whitespace) {
            None if rest.is_empty() => Ok(Slash::Set(None)),
            None => Err(format!("/set {rest} expects a value: /set temperature 0.7")),
            Some((name, value)) => Ok(Slash::Set(Some((name.into(), value.trim().into())))),
        },
        "/stats" => alone(Slash::Stats),
        "/exit" | "/quit" | "/bye" => alone(Slash::Exit),
        _ => Err(format!("unknown command {name}; /help lists them")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_and_their_arguments() {
        assert_eq!(parse("/help"), Ok(Slash::Help));
        assert_eq!(parse("/system  Be brief. "), Ok(Slash::System(Some("Be brief.".into()))));
        assert_eq!(parse("/system off"), Ok(Slash::System(Some(String::new()))));
        assert_eq!(parse("/save my talk.json"), Ok(Slash::Save("my talk.json".into())));
        let set = Slash::Set(Some(("temperature".into(), "0.7".into())));
        assert_eq!(parse("/set temperature 0.7"), Ok(set));
        assert_eq!(parse("/set"), Ok(Slash::Set(None)));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (line, expected) in [
            ("/save", "expects a file name"),
            ("/set temperature", "expects a value"),
            ("/clear all", "takes no argument"),
            ("/nonsense", "unknown command /nonsense"),
        ] {
            assert!(parse(line).unwrap_err().contains(expected), "{line}");
        }
    }

    #[test]
    fn every_listed_command_is_understood() {
        for (name, argument, _) in COMMANDS {
            let line = if *argument == "FILE" { format!("{name} x") } else { (*name).to_owned() };
            assert!(parse(&line).is_ok(), "{line}");
        }
    }
}
