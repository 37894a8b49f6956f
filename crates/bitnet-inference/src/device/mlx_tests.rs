//! A model on MLX through the engine: requests served together.

use super::*;
use crate::engine::InferenceEngine;
use crate::model::Model;
use crate::options::GenerationOptions;

/// Clients that send one request after another, of ever other lengths, all served together: each
/// answer is the one the request gets alone. With `BITNET_MLX_TRACE` this is the recorded serving
/// trace that bitnet-core replays.
#[test]
#[ignore = "needs mlx-c: scripts/test-mlx.sh"]
fn requests_served_together_are_answered_as_alone() {
    const CLIENTS: usize = 4;
    const REQUESTS: usize = 5;
    let engine = || {
        let builder = InferenceEngine::builder().device(Device::Mlx).strict_device(true);
        let engine = builder.batch_size(CLIENTS).context_length(256).build_blocking().unwrap();
        let model = engine.load_model_blocking("builtin").unwrap();
        assert_eq!(model.device().name, "mlx");
        (engine, model)
    };
    let ask = |(engine, model): &(InferenceEngine, Model), client: usize, request: usize| {
        let length = 3 + (client * 37 + request * 61) % 140;
        let prompt: Vec<u32> =
            (0..length).map(|i| ((i * 97 + client * 31 + request * 7) % 4096) as u32).collect();
        let max_tokens = 6 + (client * 11 + request * 5) % 24;
        let options = GenerationOptions::greedy().max_tokens(max_tokens as u32).ignore_eos(true);
        let answer = engine.generate_blocking(model, prompt, &options).unwrap();
        answer.tokens.iter().map(|token| token.id).collect::<Vec<_>>()
    };
    let together = engine();
    let answers: Vec<Vec<Vec<u32>>> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let (together, ask) = (&together, &ask);
                scope.spawn(move || (0..REQUESTS).map(|r| ask(together, client, r)).collect())
            })
            .collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    // The recording ends with the first engine, before the second one begins.
    drop(together);
    if std::env::var_os(bitnet_mlx::TRACE_VARIABLE).is_some() {
        return;
    }
    let alone = engine();
    for (client, answers) in answers.iter().enumerate() {
        for (request, answer) in answers.iter().enumerate().step_by(2) {
            assert_eq!(*answer, ask(&alone, client, request), "client {client} request {request}");
        }
    }
}
