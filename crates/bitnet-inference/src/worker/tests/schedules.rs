//! Random schedules of everything the engine does at once: answers free and held to a grammar,
//! scores, priorities, tenants, cancels, chunks, guesses, preemptions. Whatever happens around a
//! request, it gets what it gets alone.

use std::sync::OnceLock;

use super::*;
use crate::grammar::{Grammar, GrammarCompiler};

/// Words of the hash model's vocabulary: letters, then pairs of letters.
fn compiler() -> &'static GrammarCompiler {
    static COMPILER: OnceLock<GrammarCompiler> = OnceLock::new();
    COMPILER.get_or_init(|| {
        let letter = |i: usize| b'a' + (i % 26) as u8;
        let word = |i: usize| match i {
            0..26 => vec![letter(i)],
            _ => vec![letter(i), letter(i * 7 + 1)],
        };
        GrammarCompiler::with_words((0..VOCAB).map(word).collect(), &[39], None).unwrap()
    })
}

fn grammar(i: usize) -> Grammar {
    match i % 3 {
        0 => Grammar::Regex("([a-m]{2}[n-z]){1,9}".into()),
        1 => Grammar::Lark("start: pair+\npair: \"a\" pair? \"b\"\n".into()),
        _ => Grammar::Regex("abcdefgh|bcd[a-z]{12}".into()),
    }
}

#[derive(Debug, Clone)]
enum Kind {
    Free,
    Held(usize),
    Score,
}

/// One request of a schedule.
#[derive(Debug, Clone)]
struct Arrival {
    family: u32,
    n_prompt: usize,
    n_new: usize,
    priority: i32,
    tenant: usize,
    kind: Kind,
    /// Hang up after so many results.
    cancel_after: Option<usize>,
    /// Read so many results of the request before, before this one comes.
    pause: usize,
}

fn arrival() -> impl Strategy<Value = Arrival> {
    let kind = prop_oneof![Just(Kind::Free), (0usize..3).prop_map(Kind::Held), Just(Kind::Score)];
    let cancel = prop_oneof![3 => Just(None), 1 => (0usize..6).prop_map(Some)];
    let shape = (0u32..3, 1usize..40, 1usize..20, -1i32..2, 0usize..3);
    (shape, kind, cancel, 0usize..4).prop_map(|(shape, kind, cancel_after, pause)| {
        let (family, n_prompt, n_new, priority, tenant) = shape;
        Arrival { family, n_prompt, n_new, priority, tenant, kind, cancel_after, pause }
    })
}

impl Arrival {
    fn request(&self, seed: u64) -> Request {
        let prompt: Vec<u32> =
            (0..self.n_prompt as u32).map(|p| (p * 7 + self.family) % VOCAB as u32).collect();
        let mut request = request(&prompt, self.n_new, seed, self.priority);
        request.cache_salt = [None, Some("one"), Some("two")][self.tenant].map(Arc::from);
        match (&self.kind, &mut request.goal) {
            (Kind::Held(i), Goal::Generate(continuation)) => {
                continuation.constraint = Some(compiler().constraint(&grammar(*i)).unwrap());
                continuation.ending_tokens = vec![39];
            }
            (Kind::Score, goal) => *goal = Goal::Score { top: 2 },
            _ => {}
        }
        request
    }
}

/// Everything a request yields, as text that can be compared; times left out.
fn results(events: &mut events::UnboundedReceiver<Event>, most: usize) -> (Vec<String>, bool) {
    let mut seen = Vec::new();
    while seen.len() < most {
        match next(events).expect("a request ends with an event") {
            Event::Token(token, _) => seen.push(format!("{token:?}")),
            Event::Score(token) => seen.push(format!("{token:?}")),
            Event::Finished(reason, usage) => {
                seen.push(format!("{reason:?} {}", usage.completion_tokens));
                return (seen, true);
            }
            Event::Failed(error) => {
                seen.push(error.to_string());
                return (seen, true);
            }
            Event::Logits(_) => unreachable!("not asked for"),
        }
    }
    (seen, false)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn every_request_gets_what_it_gets_alone(
        arrivals in prop::collection::vec(arrival(), 1..14),
        n_blocks in 16usize..70,
        max_sequences in 1usize..6,
        max_tokens in 1usize..24,
        speculate in any::<bool>(),
        draft_memory in prop::sample::select(vec![None, Some(1), Some(usize::MAX)]),
        memory in prop::sample::select(vec![2, usize::MAX]),
        frugal in any::<bool>(),
    ) {
        let model = HashModel { memory, frugal, ..HashModel::new(n_blocks) };
        let draft = draft_memory
            .map(|memory| HashModel { memory, lenient: true, frugal, ..HashModel::new(n_blocks) });
        let worker =
            worker_drafted(model, draft, max_sequences, max_tokens.max(max_sequences), speculate);
        let mut open: Vec<(Vec<String>, bool, Option<events::UnboundedReceiver<Event>>)> = Vec::new();
        for (seed, arrival) in arrivals.iter().enumerate() {
            if let Some((seen, ended, Some(events))) = open.last_mut() && !*ended {
                let (more, end) = results(events, arrival.pause);
                seen.extend(more);
                *ended = end;
            }
            let mut events = worker.submit(arrival.request(seed as u64)).unwrap();
            match arrival.cancel_after {
                Some(n) => {
                    let (seen, ended) = results(&mut events, n);
                    open.push((seen, ended, None)); // hangs up
                }
                None => open.push((Vec::new(), false, Some(events))),
            }
        }
        for (seed, (arrival, (mut seen, ended, events))) in arrivals.iter().zip(open).enumerate() {
            if let Some(mut events) = events && !ended {
                seen.extend(results(&mut events, usize::MAX).0);
            }
            let lone = self::worker(HashModel { memory, ..HashModel::new(50) }, 1, 64);
            let mut events = lone.submit(arrival.request(seed as u64)).unwrap();
            let (alone, _) = results(&mut events, usize::MAX);
            // One that hung up has seen the beginning.
            prop_assert_eq!(&seen[..], &alone[..seen.len()], "{:?}", arrival);
            prop_assert!(arrival.cancel_after.is_some() || seen.len() == alone.len());
        }
        let stats = worker.stats.clone();
        drop(worker); // joins the thread, so that the counters are final
        prop_assert_eq!(stats.blocks_in_use.load(Ordering::Relaxed), 0);
        prop_assert_eq!(stats.waiting.load(Ordering::Relaxed), 0);
    }
}

#[test]
fn held_answers_belong_to_their_language() {
    let worker = worker(HashModel::new(50), 4, 16);
    let word = |id: u32| -> String {
        let letter = |i: u32| char::from(b'a' + (i % 26) as u8);
        if id < 26 {
            letter(id).to_string()
        } else {
            format!("{}{}", letter(id), letter(id * 7 + 1))
        }
    };
    for seed in 0..20 {
        let arrival = Arrival {
            family: 0,
            n_prompt: 3,
            n_new: 60,
            priority: 0,
            tenant: 0,
            kind: Kind::Held(2),
            cancel_after: None,
            pause: 0,
        };
        let tokens = tokens_of(worker.submit(arrival.request(seed)).unwrap());
        let text: String = tokens.iter().filter(|&&id| id != 39).map(|&id| word(id)).collect();
        let fits = text == "abcdefgh" || (text.starts_with("bcd") && text.len() == 15);
        assert!(fits, "{text}");
    }
}

#[test]
fn an_answer_that_cannot_go_on_fails_alone() {
    let worker = worker(HashModel::new(50), 4, 16);
    let mut stuck = request(&[1, 2], 5, 1, 0);
    let Goal::Generate(continuation) = &mut stuck.goal else { unreachable!() };
    // No word of the vocabulary holds a digit.
    continuation.constraint = Some(compiler().constraint(&Grammar::Regex("a1".into())).unwrap());
    let mut stuck = worker.submit(stuck).unwrap();
    let beside = worker.submit(request(&[3], 20, 1, 0)).unwrap();
    let (seen, ended) = results(&mut stuck, usize::MAX);
    assert!(ended && seen.last().unwrap().contains("grammar"), "{seen:?}");
    assert_eq!(tokens_of(beside), alone(&[3], 20, 1, usize::MAX));
}
