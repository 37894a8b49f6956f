//! The models an engine keeps loaded: least recently used out first, each loaded once however many
//! ask for it at the same time. Generic over what is kept, so that it is tested without models.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Condvar, Mutex, MutexGuard};

/// An LRU cache bounded by count and bytes.
pub(crate) struct LoadCache<K, V> {
    state: Mutex<State<K, V>>,
    loaded: Condvar,
    max_entries: usize,
    max_bytes: u64,
}

struct State<K, V> {
    entries: HashMap<K, Entry<V>>,
    clock: u64,
}

enum Entry<V> {
    /// Someone is loading it; wait.
    Loading,
    Ready {
        value: V,
        bytes: u64,
        used_at: u64,
    },
}

impl<K: Hash + Eq + Clone, V: Clone> LoadCache<K, V> {
    pub(crate) fn new(max_entries: usize, max_bytes: u64) -> Self {
        let state = State { entries: HashMap::new(), clock: 0 };
        Self { state: Mutex::new(state), loaded: Condvar::new(), max_entries, max_bytes }
    }

    /// The value for `key`, loaded by `load` (which also says its bytes) if nobody has yet. If a
    /// load fails, its caller gets the error and the next one who waits tries again.
    pub(crate) fn get_or_load<E>(
        &self,
        key: &K,
        load: impl FnOnce() -> Result<(V, u64), E>,
    ) -> Result<V, E> {
        let mut state = self.lock();
        loop {
            state.clock += 1;
            let now = state.clock;
            match state.entries.get_mut(key) {
                Some(Entry::Ready { value, used_at, .. }) => {
                    *used_at = now;
                    return Ok(value.clone());
                }
                Some(Entry::Loading) => {
                    state = self.loaded.wait(state).unwrap_or_else(|e| e.into_inner());
                }
                None => break,
            }
        }
        state.entries.insert(key.clone(), Entry::Loading);
        drop(state);
        // Removes the mark again if `load` fails or panics, so that nobody waits for ever.
        let mark = LoadingMark { cache: self, key };
        let (value, bytes) = load()?;
        std::mem::forget(mark);

        let mut state = self.lock();
        state.clock += 1;
        let used_at = state.clock;
        state.entries.insert(key.clone(), Entry::Ready { value: value.clone(), bytes, used_at });
        let evicted = self.evict(&mut state, key);
        drop(state);
        self.loaded.notify_all();
        drop(evicted); // Unloading a model takes time; nobody should wait for it.
        Ok(value)
    }

    /// Forgets the value for `key` if it is of no use any more.
    pub(crate) fn drop_if(&self, key: &K, useless: impl Fn(&V) -> bool) {
        let mut state = self.lock();
        let dropped = match state.entries.get(key) {
            Some(Entry::Ready { value, .. }) if useless(value) => state.entries.remove(key),
            _ => None,
        };
        drop(state);
        drop(dropped);
    }

    /// Forgets the value for `key` and returns it, if it is kept now.
    pub(crate) fn take(&self, key: &K) -> Option<V> {
        let mut state = self.lock();
        match state.entries.get(key)? {
            Entry::Loading => None,
            Entry::Ready { .. } => match state.entries.remove(key) {
                Some(Entry::Ready { value, .. }) => Some(value),
                Some(Entry::Loading) | None => None,
            },
        }
    }

    /// The value for `key` if it is kept now; does not count as use.
    pub(crate) fn peek(&self, key: &K) -> Option<V> {
        match self.lock().entries.get(key) {
            Some(Entry::Ready { value, .. }) => Some(value.clone()),
            Some(Entry::Loading) | None => None,
        }
    }

    /// Entries and bytes kept now.
    pub(crate) fn usage(&self) -> (usize, u64) {
        let state = self.lock();
        let bytes = |entry: &Entry<V>| match entry {
            Entry::Ready { bytes, .. } => Some(*bytes),
            Entry::Loading => None,
        };
        let sizes: Vec<u64> = state.entries.values().filter_map(bytes).collect();
        (sizes.len(), sizes.iter().sum())
    }

    /// Forgets everything that is loaded.
    pub(crate) fn clear(&self) {
        let mut state = self.lock();
        let loading = |entry: &mut Entry<V>| matches!(entry, Entry::Loading);
        let ready: Vec<_> = state.entries.extract_if(|_, entry| !loading(entry)).collect();
        drop(state);
        drop(ready);
    }

    /// Takes out what has been unused longest until the bounds hold; `keep` always stays.
    fn evict(&self, state: &mut State<K, V>, keep: &K) -> Vec<Entry<V>> {
        let mut evicted = Vec::new();
        loop {
            let (mut count, mut total, mut oldest) = (0, 0u64, None);
            for (key, entry) in &state.entries {
                let Entry::Ready { bytes, used_at, .. } = entry else { continue };
                count += 1;
                total += bytes;
                if key != keep && oldest.as_ref().is_none_or(|(at, _)| used_at < at) {
                    oldest = Some((*used_at, key.clone()));
                }
            }
            let Some((_, key)) = oldest else { return evicted };
            if count <= self.max_entries && total <= self.max_bytes {
                return evicted;
            }
            evicted.extend(state.entries.remove(&key));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<K, V>> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

struct LoadingMark<'a, K: Hash + Eq + Clone, V: Clone> {
    cache: &'a LoadCache<K, V>,
    key: &'a K,
}

impl<K: Hash + Eq + Clone, V: Clone> Drop for LoadingMark<'_, K, V> {
    fn drop(&mut self) {
        self.cache.lock().entries.remove(self.key);
        self.cache.loaded.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn ok(value: u32, bytes: u64) -> impl FnOnce() -> Result<(u32, u64), ()> {
        move || Ok((value, bytes))
    }

    #[test]
    fn the_count_is_bounded_and_the_least_recently_used_goes() {
        let cache = LoadCache::new(2, 1000);
        cache.get_or_load(&"a", ok(1, 1)).unwrap();
        cache.get_or_load(&"b", ok(2, 1)).unwrap();
        cache.get_or_load(&"a", ok(9, 1)).unwrap();
        cache.get_or_load(&"c", ok(3, 1)).unwrap();
        assert_eq!(cache.usage(), (2, 2));
        assert_eq!((cache.peek(&"b"), cache.peek(&"a")), (None, Some(1)));
        assert_eq!(cache.get_or_load(&"a", ok(9, 1)), Ok(1), "a was used after b");
        assert_eq!(cache.get_or_load(&"b", ok(8, 1)), Ok(8), "b was evicted");
    }

    #[test]
    fn the_bytes_are_bounded_but_the_newest_stays() {
        let cache = LoadCache::new(10, 100);
        cache.get_or_load(&1, ok(1, 60)).unwrap();
        cache.get_or_load(&2, ok(2, 60)).unwrap();
        assert_eq!(cache.usage(), (1, 60));
        cache.get_or_load(&3, ok(3, 500)).unwrap();
        assert_eq!(cache.usage(), (1, 500));
    }

    #[test]
    fn concurrent_requests_load_once() {
        let cache = LoadCache::new(2, 100);
        let loads = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let load = || {
                        loads.fetch_add(1, Ordering::SeqCst);
                        std::thread::sleep(std::time::Duration::from_millis(20));
                        Ok::<_, ()>((7, 1))
                    };
                    assert_eq!(cache.get_or_load(&"model", load), Ok(7));
                });
            }
        });
        assert_eq!(loads.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn what_was_taken_out_is_loaded_again() {
        let cache = LoadCache::new(2, 100);
        assert_eq!(cache.take(&"a"), None::<u32>);
        cache.get_or_load(&"a", ok(1, 1)).unwrap();
        assert_eq!((cache.take(&"a"), cache.usage()), (Some(1), (0, 0)));
        assert_eq!(cache.get_or_load(&"a", ok(2, 1)), Ok(2));
    }

    #[test]
    fn a_failed_load_is_tried_again_by_the_next() {
        let cache: LoadCache<&str, u32> = LoadCache::new(2, 100);
        assert_eq!(cache.get_or_load(&"a", || Err("no file")), Err("no file"));
        assert_eq!(cache.get_or_load(&"a", || Ok::<_, &str>((1, 1))), Ok(1));
    }
}
