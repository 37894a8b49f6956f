//! How long a model stays in memory after its last request.
//!
//! Whoever uses a model holds a [`ModelUse`]. When the last of them is dropped, the model has been idle
//! since then, and its time begins: none at all, some, or as long as no other model needs the room.
//! Requests of Ollama's clients choose it (`keep_alive`); a model that was unloaded starts again with
//! the server's default. Knows no wire format and no names.

use std::ops::Deref;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bitnet_inference::{InferenceEngine, Model};
use tokio::runtime::Handle;
use tokio::sync::Notify;

/// How long a model stays in memory after its last request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KeepAlive {
    /// Until others need the room.
    #[default]
    Always,
    /// So long; zero unloads it with the end of its last request.
    For(Duration),
}

impl KeepAlive {
    /// From seconds; [`Always`](Self::Always) for a negative number, and for a century. `None` for NaN.
    pub fn from_seconds(seconds: f64) -> Option<Self> {
        const CENTURY: f64 = 100.0 * 365.0 * 86_400.0;
        if !(0.0..CENTURY).contains(&seconds) {
            return (!seconds.is_nan()).then_some(Self::Always);
        }
        Duration::try_from_secs_f64(seconds).ok().map(Self::For)
    }
}

/// Not a duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected seconds, or a duration such as `5m`, `1h30m` or `-1s`")]
pub struct KeepAliveError;

impl FromStr for KeepAlive {
    type Err = KeepAliveError;

    /// Seconds without a unit, or numbers with the units `h`, `m`, `s`, `ms`, `us` and `ns`, one behind
    /// the other; a minus before them all makes it [`Always`](Self::Always).
    fn from_str(text: &str) -> Result<Self, KeepAliveError> {
        let (negative, unsigned) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text.strip_prefix('+').unwrap_or(text)),
        };
        let seconds = match decimal(unsigned) {
            Some(seconds) => seconds,
            None => with_units(unsigned).ok_or(KeepAliveError)?,
        };
        match negative {
            true => Ok(Self::Always),
            false => Self::from_seconds(seconds).ok_or(KeepAliveError),
        }
    }
}

/// A number of digits and at most one point.
fn decimal(text: &str) -> Option<f64> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    if plain { text.parse().ok() } else { None }
}

fn with_units(mut text: &str) -> Option<f64> {
    if text.is_empty() {
        return None;
    }
    let mut seconds = 0.0;
    while !text.is_empty() {
        let number = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let unit = text[number..].find(|c: char| c.is_ascii_digit() || c == '.');
        let end = unit.map_or(text.len(), |unit| number + unit);
        let worth = match &text[number..end] {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" | "μs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        seconds += decimal(&text[..number])? * worth;
        text = &text[end..];
    }
    Some(seconds)
}

/// Who uses a model, and what happens when nobody does any more.
#[derive(Debug)]
pub(crate) struct Residency {
    engine: InferenceEngine,
    path: PathBuf,
    default: KeepAlive,
    state: Mutex<State>,
    /// The time at which it ends may have changed.
    changed: Notify,
}

#[derive(Debug)]
struct State {
    keep: KeepAlive,
    n_users: usize,
    idle_since: Instant,
    /// A task waits for the end of its time.
    is_watched: bool,
}

impl State {
    /// When it is to be unloaded; `None`: not by the clock.
    fn end(&self) -> Option<Instant> {
        match self.keep {
            KeepAlive::For(time) if self.n_users == 0 => self.idle_since.checked_add(time),
            _ => None,
        }
    }
}

impl Residency {
    pub(crate) fn new(engine: InferenceEngine, path: PathBuf, default: KeepAlive) -> Self {
        let idle_since = Instant::now();
        let state = State { keep: default, n_users: 0, idle_since, is_watched: false };
        Self { engine, path, default, state: Mutex::new(state), changed: Notify::new() }
    }

    /// Counts a user in, who may choose how long the model stays.
    pub(crate) fn enter(self: &Arc<Self>, keep: Option<KeepAlive>) -> UseGuard {
        let mut state = self.lock();
        state.n_users += 1;
        state.keep = keep.unwrap_or(state.keep);
        UseGuard(self.clone())
    }

    /// How long it stays from now on, as things are; `None`: until others need the room.
    pub(crate) fn remaining(&self) -> Option<Duration> {
        let state = self.lock();
        match (state.keep, state.end()) {
            (KeepAlive::Always, _) => None,
            (_, Some(end)) => Some(end.saturating_duration_since(Instant::now())),
            (KeepAlive::For(time), None) => Some(time),
        }
    }

    /// Counts a user out.
    fn leave(self: &Arc<Self>) {
        let mut state = self.lock();
        state.n_users -= 1;
        state.idle_since = Instant::now();
        let Some(end) = state.end() else { return };
        if end <= state.idle_since {
            self.unload(&mut state);
        } else if !state.is_watched
            && let Ok(runtime) = Handle::try_current()
        {
            state.is_watched = true;
            runtime.spawn(self.clone().watch());
        }
        self.changed.notify_one();
    }

    /// Unloads the model when its time is over; ends when there is none to wait for.
    async fn watch(self: Arc<Self>) {
        loop {
            let end = {
                let mut state = self.lock();
                let end = state.end().filter(|&end| end > Instant::now());
                let Some(end) = end else {
                    if state.end().is_some() {
                        self.unload(&mut state);
                    }
                    state.is_watched = false;
                    return;
                };
                end
            };
            tokio::select! {
                () = tokio::time::sleep_until(end.into()) => {}
                () = self.changed.notified() => {}
            }
        }
    }

    /// Under the lock, so that whoever comes next finds it gone and loads it anew.
    fn unload(&self, state: &mut State) {
        state.keep = self.default;
        let Some(model) = self.engine.unload_model(&self.path) else { return };
        tracing::info!(model = model.get_model_id(), "model unloaded: nobody used it");
        // Giving memory back and waiting for the model's thread takes a while.
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn_blocking(move || drop(model));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Somebody who uses a model.
#[derive(Debug)]
pub(crate) struct UseGuard(Arc<Residency>);

impl Clone for UseGuard {
    fn clone(&self) -> Self {
        self.0.enter(None)
    }
}

impl Drop for UseGuard {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// A model that stays in memory at least as long as this.
#[derive(Debug, Clone)]
pub(crate) struct ModelUse {
    // Dropped first: then the engine's own copy is the last.
    model: Model,
    _guard: UseGuard,
}

impl ModelUse {
    pub(crate) fn new(model: Model, guard: UseGuard) -> Self {
        Self { model, _guard: guard }
    }
}

impl Deref for ModelUse {
    type Target = Model;

    fn deref(&self) -> &Model {
        &self.model
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_ollama_reads_them() {
        let seconds = |seconds: f64| Ok(KeepAlive::For(Duration::from_secs_f64(seconds)));
        for (text, expected) in [
            ("5m", seconds(300.0)),
            ("1h30m", seconds(5400.0)),
            ("1.5h", seconds(5400.0)),
            ("250ms", seconds(0.25)),
            ("2m0.5s", seconds(120.5)),
            ("0", seconds(0.0)),
            ("0s", seconds(0.0)),
            ("90", seconds(90.0)),
            ("+3s", seconds(3.0)),
            ("-1", Ok(KeepAlive::Always)),
            ("-1m", Ok(KeepAlive::Always)),
        ] {
            assert_eq!(text.parse(), expected, "{text}");
        }
        for text in ["", "-", "m", "5 m", "5x", "1e3", "inf", "nan", "..", "5m3", "1m-3s", "ü"] {
            assert_eq!(text.parse::<KeepAlive>(), Err(KeepAliveError), "{text:?}");
        }
        assert_eq!("9".repeat(400).parse(), Ok(KeepAlive::Always));
        assert_eq!(KeepAlive::from_seconds(f64::NAN), None);
        assert_eq!(KeepAlive::from_seconds(-0.5), Some(KeepAlive::Always));
    }

    fn loaded(keep: KeepAlive) -> (InferenceEngine, Arc<Residency>) {
        let engine = InferenceEngine::builder().build_blocking().unwrap();
        engine.load_model_blocking("builtin").unwrap();
        let residency = Residency::new(engine.clone(), "builtin".into(), keep);
        (engine, Arc::new(residency))
    }

    fn is_loaded(engine: &InferenceEngine) -> bool {
        engine.loaded_model("builtin").is_some()
    }

    #[tokio::test]
    async fn no_time_unloads_with_the_last_user_and_the_default_is_back() {
        let (engine, residency) = loaded(KeepAlive::Always);
        let (first, second) =
            (residency.enter(None), residency.enter(Some(KeepAlive::For(Duration::ZERO))));
        drop(second);
        assert!(is_loaded(&engine), "the first still uses it");
        drop(first);
        assert!(!is_loaded(&engine));
        engine.load_model("builtin").await.unwrap();
        drop(residency.enter(None));
        assert!(is_loaded(&engine));
        assert_eq!(residency.remaining(), None);
    }

    #[tokio::test]
    async fn time_runs_from_the_last_use_and_may_be_changed() {
        let hour = KeepAlive::For(Duration::from_secs(3600));
        let (engine, residency) = loaded(hour);
        drop(residency.enter(None));
        assert!(residency.remaining().unwrap() > Duration::from_secs(3500));
        // A task waits for the hour; a shorter time wakes it.
        drop(residency.enter(Some(KeepAlive::For(Duration::from_millis(200)))));
        tokio::time::sleep(Duration::from_millis(100)).await;
        let user = residency.enter(None);
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(is_loaded(&engine), "in use");
        drop(user);
        for _ in 0..500 {
            if !is_loaded(&engine) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(!is_loaded(&engine));
        assert_eq!(residency.lock().keep, hour, "the default is back");
    }
}
