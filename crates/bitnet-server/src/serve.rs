//! Accepting connections and ending well.
//!
//! hyper serves each connection in a task of its own, with a bound on the head's size and on the time
//! it may take; a semaphore bounds connections. When the server drains, idle connections close, open
//! requests finish or are cancelled after the grace period, and [`serve`] returns.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
#[cfg(unix)]
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::config::{Limits, Listen, ServerConfig};
use crate::lifecycle::{Lifecycle, Phase};
use crate::state::AppState;

/// How often histograms are moved into their buckets.
const UPKEEP: Duration = Duration::from_secs(5);

/// A listener on which requests arrive.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// TCP with TLS.
    #[cfg(feature = "tls")]
    Tls(TcpListener, crate::tls::Acceptor),
    /// A Unix domain socket.
    #[cfg(unix)]
    Unix(tokio::net::UnixListener),
}

/// Opens the listener of a configuration.
///
/// # Errors
/// The address is in use or not allowed.
pub async fn bind(config: &ServerConfig) -> io::Result<Listener> {
    match &config.listen {
        Listen::Tcp(address) => {
            let listener = TcpListener::bind(address).await?;
            #[cfg(feature = "tls")]
            if let Some((certificates, key)) = &config.tls {
                return Ok(Listener::Tls(listener, crate::tls::acceptor(certificates, key)?));
            }
            Ok(Listener::Tcp(listener))
        }
        #[cfg(unix)]
        Listen::Unix(path) => bind_unix(path).map(Listener::Unix),
    }
}

#[cfg(unix)]
fn bind_unix(path: &Path) -> io::Result<tokio::net::UnixListener> {
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    // A socket nobody listens on is left from a server that was killed; anything else stays.
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket());
    if is_socket && std::os::unix::net::UnixStream::connect(path).is_err() {
        std::fs::remove_file(path)?;
    }
    let listener = tokio::net::UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

fn remove_socket(listen: &Listen) {
    match listen {
        Listen::Tcp(_) => {}
        #[cfg(unix)]
        Listen::Unix(path) => {
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!(%error, "the socket's file is left");
            }
        }
    }
}

impl Listener {
    /// The TCP address it listens on, with the port the system chose where 0 was asked for.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr().ok(),
            #[cfg(feature = "tls")]
            Self::Tls(listener, _) => listener.local_addr().ok(),
            #[cfg(unix)]
            Self::Unix(_) => None,
        }
    }
}

/// Serves `app` until the lifecycle is told to drain, then until all requests have ended or the
/// grace period is over.
///
/// # Errors
/// Accepting fails for good; a lack of file descriptors is waited out.
pub async fn serve(listener: Listener, app: Router, state: AppState) -> io::Result<()> {
    let config = state.config();
    let (listen, limits) = (config.listen.clone(), config.limits.clone());
    let lifecycle = state.lifecycle().clone();
    let connections = Arc::new(Semaphore::new(limits.max_connections.min(Semaphore::MAX_PERMITS)));
    let upkeep = tokio::spawn(upkeep(state));
    let outcome = tokio::select! {
        outcome = accept(&listener, &app, &limits, &lifecycle, &connections) => outcome,
        () = lifecycle.reached(Phase::Draining) => Ok(()),
    };
    // Closed now, so that new clients are turned away by the system and may try another server. The
    // file goes first: once the socket is closed, another server may put its own there.
    remove_socket(&listen);
    drop(listener);
    drain(&lifecycle, &limits, &connections).await;
    upkeep.abort();
    outcome
}

async fn upkeep(state: AppState) {
    let mut ticks = tokio::time::interval(UPKEEP);
    loop {
        ticks.tick().await;
        state.metrics().upkeep();
    }
}

/// Lets requests finish, then cancels what is left, then waits for connections to close.
async fn drain(lifecycle: &Lifecycle, limits: &Limits, connections: &Semaphore) {
    lifecycle.advance(Phase::Draining);
    if tokio::time::timeout(limits.drain_grace, lifecycle.idle()).await.is_err() {
        tracing::warn!("the grace period is over; cancelling the requests still in work");
    }
    lifecycle.advance(Phase::Cancelled);
    // Long enough to write the last events, short enough for readers that do not read.
    let all = connections.acquire_many(limits.max_connections.min(Semaphore::MAX_PERMITS) as u32);
    let _ = tokio::time::timeout(Duration::from_secs(2), all).await;
}

async fn accept(
    listener: &Listener,
    app: &Router,
    limits: &Limits,
    lifecycle: &Lifecycle,
    connections: &Arc<Semaphore>,
) -> io::Result<()> {
    loop {
        // Taken before accepting: who comes too many waits in the system's backlog.
        let permit = connections.clone().acquire_owned().await.map_err(io::Error::other)?;
        let (app, lifecycle, limits) = (app.clone(), lifecycle.clone(), limits.clone());
        match listener {
            Listener::Tcp(listener) => {
                let Some(stream) = accepted(listener.accept().await).await? else { continue };
                let _ = stream.set_nodelay(true);
                tokio::spawn(async move {
                    let _permit = permit;
                    connection(stream, app, &limits, &lifecycle).await;
                });
            }
            #[cfg(feature = "tls")]
            Listener::Tls(listener, acceptor) => {
                let Some(stream) = accepted(listener.accept().await).await? else { continue };
                let _ = stream.set_nodelay(true);
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let _permit = permit;
                    let handshake = acceptor.accept(stream);
                    match tokio::time::timeout(limits.header_read_timeout, handshake).await {
                        Ok(Ok(stream)) => connection(stream, app, &limits, &lifecycle).await,
                        Ok(Err(error)) => tracing::debug!(%error, "TLS handshake failed"),
                        Err(_) => tracing::debug!("TLS handshake took too long"),
                    }
                });
            }
            #[cfg(unix)]
            Listener::Unix(listener) => {
                let Some(stream) = accepted(listener.accept().await).await? else { continue };
                tokio::spawn(async move {
                    let _permit = permit;
                    connection(stream, app, &limits, &lifecycle).await;
                });
            }
        }
    }
}

/// The stream of an accepted connection; `None` if this one failed but the next may not.
async fn accepted<S, A>(result: io::Result<(S, A)>) -> io::Result<Option<S>> {
    match result {
        Ok((stream, _)) => Ok(Some(stream)),
        Err(error) if is_connection_error(&error) => Ok(None),
        Err(error) if is_exhaustion(&error) => {
            tracing::warn!(%error, "cannot accept connections");
            tokio::time::sleep(Duration::from_millis(200)).await;
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn is_connection_error(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

/// Out of descriptors (EMFILE 24, ENFILE 23) or memory (ENOMEM 12, ENOBUFS 105): it passes.
fn is_exhaustion(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(12 | 23 | 24 | 105))
}

async fn connection<S>(stream: S, app: Router, limits: &Limits, lifecycle: &Lifecycle)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_read_timeout)
        .max_buf_size(limits.max_header_bytes)
        .max_headers(limits.max_headers)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(app));
    let mut connection = std::pin::pin!(connection);
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = lifecycle.reached(Phase::Draining) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(error = %crate::error::chain(&error), "connection ended");
    }
}

/// Listens for signals to stop (SIGTERM, SIGINT) from now on. The future drains on the first and ends
/// with the second, whereupon the program should exit without waiting any longer.
///
/// # Errors
/// Signals cannot be listened for.
pub fn drain_on_signal(lifecycle: Lifecycle) -> io::Result<impl Future<Output = ()>> {
    let mut signals = StopSignals::new()?;
    Ok(async move {
        signals.next().await;
        tracing::info!("stopping: no new requests are taken; a second signal exits at once");
        lifecycle.advance(Phase::Draining);
        signals.next().await;
    })
}

#[cfg(unix)]
struct StopSignals([tokio::signal::unix::Signal; 2]);

#[cfg(unix)]
impl StopSignals {
    fn new() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self([signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?]))
    }

    fn next(&mut self) -> impl Future<Output = ()> {
        let [terminate, interrupt] = &mut self.0;
        async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        }
    }
}

#[cfg(not(unix))]
struct StopSignals;

#[cfg(not(unix))]
impl StopSignals {
    fn new() -> io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) {
        let _ = tokio::signal::ctrl_c().await;
    }
}
