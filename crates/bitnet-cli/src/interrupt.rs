//! Ctrl-C: ends the program at once, unless a command has asked to end its work itself.
//!
//! While a generation or an evaluation runs, the first Ctrl-C only raises a flag and wakes the main
//! thread; a second one ends the program, so that nothing can hold it hostage.

use std::future::Future;
use std::pin::pin;
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

use anyhow::Context as _;

use crate::exit::INTERRUPTED;

/// The program's Ctrl-C handler.
pub(crate) struct Interrupt(Arc<Shared>);

struct Shared {
    /// Someone looks at `raised` and will act on it.
    caught: AtomicBool,
    raised: AtomicBool,
    waiter: Thread,
}

impl Interrupt {
    /// Installs the handler. Waiting happens on the calling thread.
    pub(crate) fn install() -> anyhow::Result<Self> {
        let shared = Arc::new(Shared {
            caught: AtomicBool::new(false),
            raised: AtomicBool::new(false),
            waiter: thread::current(),
        });
        let handler = shared.clone();
        ctrlc::set_handler(move || {
            let caught = handler.caught.load(Ordering::SeqCst);
            if !caught || handler.raised.swap(true, Ordering::SeqCst) {
                process::exit(INTERRUPTED.into());
            }
            handler.waiter.unpark();
        })
        .context("cannot handle Ctrl-C")?;
        Ok(Self(shared))
    }

    /// Until the result is dropped, Ctrl-C raises a flag instead of ending the program.
    pub(crate) fn catch(&self) -> Caught<'_> {
        self.0.raised.store(false, Ordering::SeqCst);
        self.0.caught.store(true, Ordering::SeqCst);
        Caught(self)
    }
}

/// The time in which Ctrl-C is a flag.
pub(crate) struct Caught<'a>(&'a Interrupt);

impl Caught<'_> {
    /// Whether Ctrl-C was pressed in this time.
    pub(crate) fn raised(&self) -> bool {
        self.0.0.raised.load(Ordering::SeqCst)
    }

    /// Waits for `future` on the calling thread; `None` if Ctrl-C came first.
    pub(crate) fn wait<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        let waker = Waker::from(Arc::new(Unpark(self.0.0.waiter.clone())));
        let mut context = Context::from_waker(&waker);
        let mut future = pin!(future);
        loop {
            if self.raised() {
                return None;
            }
            match future.as_mut().poll(&mut context) {
                Poll::Ready(value) => return Some(value),
                Poll::Pending => thread::park(),
            }
        }
    }
}

impl Drop for Caught<'_> {
    fn drop(&mut self) {
        self.0.0.caught.store(false, Ordering::SeqCst);
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}
