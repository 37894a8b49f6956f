//! Waiting for a future on a thread that has no async runtime: the blocking face of the API.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs a future to its end on the calling thread, which sleeps while it waits.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => return output,
            Poll::Pending => std::thread::park(),
        }
    }
}

/// Runs futures beside each other to their ends on the calling thread; results in their order.
pub(crate) fn block_on_all<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
    let mut open: Vec<_> = futures.into_iter().map(Box::pin).map(Some).collect();
    let mut outputs: Vec<Option<F::Output>> = open.iter().map(|_| None).collect();
    block_on(std::future::poll_fn(|context| {
        for (future, output) in open.iter_mut().zip(&mut outputs) {
            if let Some(Poll::Ready(done)) = future.as_mut().map(|f| f.as_mut().poll(context)) {
                *output = Some(done);
                *future = None;
            }
        }
        if open.iter().all(Option::is_none) { Poll::Ready(()) } else { Poll::Pending }
    }));
    outputs.into_iter().map(|output| output.expect("every future has ended")).collect()
}
