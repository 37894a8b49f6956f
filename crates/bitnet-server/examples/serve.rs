//! The shortest server: the built-in model on an address given as the only argument.
//!
//! `cargo run --release -p bitnet-server --example serve -- 127.0.0.1:8080`

use bitnet_inference::InferenceEngine;
use bitnet_server::{AppState, Listen, ServerConfig};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut config = ServerConfig::default();
    if let Some(address) = std::env::args().nth(1) {
        config.listen = Listen::Tcp(address.parse()?);
    }
    let engine = InferenceEngine::balanced().await?;
    let state = AppState::new(engine, config)?;
    let listener = bitnet_server::bind(state.config()).await?;
    let stopped = bitnet_server::drain_on_signal(state.lifecycle().clone())?;
    if let Some(address) = listener.local_addr() {
        println!("listening on http://{address}");
    }
    let app = bitnet_server::router(state.clone());
    tokio::select! {
        served = bitnet_server::serve(listener, app, state.clone()) => served?,
        () = stopped => {}
    }
    Ok(())
}
