//! Any text as a chat template.
#![no_main]

use bitnet_inference::chat_template::{ChatTemplate, Message};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&str, &str)| {
    let (template, content) = input;
    if let Ok(template) = ChatTemplate::new(template, &[]) {
        let _ = template.render(&[Message::user(content)], true);
    }
});
