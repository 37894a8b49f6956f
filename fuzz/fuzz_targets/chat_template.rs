//! Any text as a chat template, rendered with and without tools.
#![no_main]

use bitnet_inference::{ChatOptions, ChatTemplate, Message};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|source: &str| {
    let tokens = [("bos_token".into(), "<s>".into()), ("eos_token".into(), "</s>".into())];
    let Ok(template) = ChatTemplate::new(source, &tokens) else { return };
    let messages = [
        Message::system("Be brief."),
        Message::user("Hello <s> wörld"),
        Message::assistant("<think>hm</think>\n\nHi."),
        Message::user(""),
    ];
    let tool = serde_json::json!({"type": "function", "function": {"name": "now", "parameters": {}}});
    for tools in [vec![], vec![tool]] {
        let options = ChatOptions { tools, ..ChatOptions::default() };
        let _ = template.render(&messages, &options);
    }
});
