//! What the server adds to the engine, by the clock: the same streams asked of the engine and over HTTP.
//!
//! `cargo run --release -p bitnet-server --example overhead -- [MODEL] [STREAMS] [ROUNDS]`
//!
//! One process, one loaded model: engine and server differ in nothing but the way to them, and turns
//! alternate, so that what the machine does meanwhile falls on both. A turn starts so many streams
//! together and takes the time until the last has ended. Both must give the same text. Run it on a
//! machine that does nothing else: the client and the server share its processors with the model.

use std::net::SocketAddr;
use std::time::Instant;

use bitnet_inference::{EngineConfig, GenerationOptions, InferenceEngine, InferenceInput, Model};
use bitnet_server::{AppState, Listen, ServerConfig};
use futures::StreamExt;
use futures::future::try_join_all;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Tokens of an answer.
const TOKENS: u32 = 48;

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let model = arguments.first().map_or("builtin", String::as_str).to_owned();
    let n_streams: usize = arguments.get(1).map_or(Ok(16), |n| n.parse())?;
    let n_rounds: usize = arguments.get(2).map_or(Ok(8), |n| n.parse())?;
    // As `bitnet serve` has it.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(compare(model, n_streams, n_rounds))
}

async fn compare(path: String, n_streams: usize, n_rounds: usize) -> Outcome<()> {
    let engine = InferenceEngine::with_config(EngineConfig::balanced())?;
    let config = ServerConfig {
        listen: Listen::Tcp(SocketAddr::from(([127, 0, 0, 1], 0))),
        models: vec![("m".into(), path.clone().into())],
        ..ServerConfig::default()
    };
    let state = AppState::new(engine.clone(), config)?;
    let listener = bitnet_server::bind(state.config()).await?;
    let address = listener.local_addr().ok_or("no TCP address")?;
    let app = bitnet_server::router(state.clone());
    tokio::spawn(bitnet_server::serve(listener, app, state));
    let model = engine.load_model(&path).await?;

    let mut shares = Vec::new();
    println!("round   engine tok/s   server tok/s   server's time over the engine's");
    for round in 0..=n_rounds {
        // Prompts nobody has sent yet: nothing is found in the prefix cache.
        let prompts: [Vec<Vec<u32>>; 2] = std::array::from_fn(|side| {
            let seed = (round * 2 + side) as u32;
            (0..n_streams as u32).map(|i| prompt(seed, i)).collect()
        });
        // Every other round the server goes first.
        let (mut times, mut texts) = ([0.0; 2], [Vec::new(), Vec::new()]);
        for turn in 0..2 {
            let side = (round + turn) % 2;
            let started = Instant::now();
            texts[side] = match side {
                0 => asked_of_engine(&engine, &model, &prompts[0]).await?,
                _ => asked_over_http(address, &prompts[1]).await?,
            };
            times[side] = started.elapsed().as_secs_f64();
        }
        let same = asked_of_engine(&engine, &model, &prompts[1][..1]).await?;
        assert_eq!(same[0], texts[1][0], "the server gives the engine's text");
        if round == 0 {
            continue; // Memory is touched for the first time.
        }
        let share = times[1] / times[0] - 1.0;
        let rate = |seconds: f64| n_streams as f64 * f64::from(TOKENS) / seconds;
        println!(
            "{round:>5}   {:>12.1}   {:>12.1}   {:>+8.2} %",
            rate(times[0]),
            rate(times[1]),
            share * 100.0
        );
        shares.push(share);
    }
    shares.sort_by(f64::total_cmp);
    let quartile = |q: usize| shares[(shares.len() - 1) * q / 4] * 100.0;
    println!(
        "{n_streams} at a time, {TOKENS} tokens each: median {:+.2} %, quartiles {:+.2} % and {:+.2} %",
        quartile(2),
        quartile(1),
        quartile(3)
    );
    Ok(())
}

/// Four tokens; every stream of every turn begins with another.
fn prompt(seed: u32, stream: u32) -> Vec<u32> {
    (0..4).map(|i| 256 + (seed * 977 + stream * 61 + i * 389) % 3800).collect()
}

async fn asked_of_engine(
    engine: &InferenceEngine,
    model: &Model,
    prompts: &[Vec<u32>],
) -> Outcome<Vec<String>> {
    let options = GenerationOptions::greedy().max_tokens(TOKENS).ignore_eos(true);
    let one = async |prompt: &Vec<u32>| -> Outcome<String> {
        let mut stream = engine.stream(model, InferenceInput::Tokens(prompt.clone()), &options)?;
        let mut text = String::new();
        while let Some(chunk) = StreamExt::next(&mut stream).await {
            text.push_str(&chunk?.text);
        }
        Ok(text)
    };
    try_join_all(prompts.iter().map(one)).await
}

async fn asked_over_http(address: SocketAddr, prompts: &[Vec<u32>]) -> Outcome<Vec<String>> {
    let one = async |prompt: &Vec<u32>| -> Outcome<String> {
        let body = json!({
            "model": "m", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0,
            "ignore_eos": true, "stream": true,
        });
        let stream = TcpStream::connect(address).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::post("/v1/completions")
            .header("host", address.to_string())
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body.to_string())))?;
        let mut response = sender.send_request(request).await?;
        assert_eq!(response.status(), 200);
        let (mut text, mut line) = (String::new(), Vec::new());
        while let Some(frame) = response.body_mut().frame().await {
            for &byte in frame?.data_ref().into_iter().flatten() {
                if byte != b'\n' {
                    line.push(byte);
                } else if let Some(data) = std::mem::take(&mut line).strip_prefix(b"data: ")
                    && data != b"[DONE]"
                {
                    let chunk: Value = serde_json::from_slice(data)?;
                    text.push_str(chunk["choices"][0]["text"].as_str().unwrap_or_default());
                }
            }
        }
        Ok(text)
    };
    try_join_all(prompts.iter().map(one)).await
}
