//! What a run took, in words for people and as JSON for programs.

use std::time::Duration;

use bitnet_core::backend::DeviceInfo;
use bitnet_inference::{Model, Usage};
use serde_json::{Value, json};

use crate::term::{Term, bytes, count, duration, rate};

/// One line: tokens, rates, and the time to the first token.
pub(crate) fn usage_line(usage: &Usage) -> String {
    let mut parts = Vec::new();
    let mut prompt = counted(usage.prompt_tokens, "prompt token");
    if usage.cached_tokens > 0 {
        prompt.push_str(&format!(" ({} known already)", count(usage.cached_tokens as u64)));
    }
    if let Some(r) = usage.prefill_tokens_per_second() {
        prompt.push_str(&format!(" at {} tok/s", rate(r)));
    }
    parts.push(prompt);
    let mut answer = counted(usage.completion_tokens, "new token");
    if let Some(r) = usage.decode_tokens_per_second() {
        answer.push_str(&format!(" at {} tok/s", rate(r)));
    }
    parts.push(answer);
    if usage.completion_tokens > 0 {
        parts.push(format!("first token after {}", duration(time_to_first_token(usage))));
    }
    parts.join(" · ")
}

fn counted(n: usize, what: &str) -> String {
    format!("{} {what}{}", count(n as u64), if n == 1 { "" } else { "s" })
}

/// From the request's arrival to its first token.
pub(crate) fn time_to_first_token(usage: &Usage) -> Duration {
    usage.queued + usage.prefill
}

/// Counts and times of a request; rates are null where nothing was timed.
pub(crate) fn usage_json(usage: &Usage) -> (Value, Value) {
    let counts = json!({
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
    });
    let times = json!({
        "time_to_first_token_seconds": time_to_first_token(usage).as_secs_f64(),
        "prefill_seconds": usage.prefill.as_secs_f64(),
        "decode_seconds": usage.decode.as_secs_f64(),
        "prefill_tokens_per_second": usage.prefill_tokens_per_second(),
        "decode_tokens_per_second": usage.decode_tokens_per_second(),
    });
    (counts, times)
}

/// What happened to a model after it said `known` warnings: a device that was lost. Returns how many
/// it has said now.
pub(crate) fn moved(model: &Model, known: usize, term: &Term) -> usize {
    let warnings = model.warnings();
    for warning in warnings.iter().skip(known) {
        term.warn(warning);
    }
    warnings.len()
}

/// The kernel of a device and, where that means something, its threads.
pub(crate) fn kernel(device: &DeviceInfo) -> String {
    match device.threads {
        0 => format!("kernel {}", device.kernel),
        n => format!("kernel {}, {n} threads", device.kernel),
    }
}

/// For those who asked: where the model runs, how long loading took, what it holds.
pub(crate) fn loaded(model: &Model, term: &Term) {
    if !term.is_verbose() {
        return;
    }
    let device = model.device();
    term.detail(&format!(
        "{} on {} ({}), {}",
        model.get_model_id(),
        device.name,
        device.hardware,
        kernel(device)
    ));
    let memory = model.memory();
    term.detail(&format!(
        "loaded in {} · {} weights in {} · KV cache {:?} of up to {} for {} tokens · activations {}",
        duration(model.load_time()),
        count(model.get_total_weight_count()),
        bytes(memory.weights),
        model.kv_spec().dtype,
        bytes(memory.kv_cache),
        count(model.context_length() as u64),
        bytes(memory.activations),
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_tells_what_a_run_took() {
        let usage = Usage {
            prompt_tokens: 12,
            cached_tokens: 2,
            completion_tokens: 11,
            queued: Duration::from_millis(1),
            prefill: Duration::from_millis(10),
            decode: Duration::from_millis(100),
        };
        assert_eq!(
            usage_line(&usage),
            "12 prompt tokens (2 known already) at 1,000 tok/s · 11 new tokens at 100.0 tok/s \
             · first token after 11.0 ms"
        );
        let nothing = usage_line(&Usage { prompt_tokens: 1, ..Usage::default() });
        assert_eq!(nothing, "1 prompt token · 0 new tokens");
    }
}
