//! Who runs when: fairness, sharing and memory, step by step and without a model.

use super::*;
use crate::request::{Continuation, Event, Goal, Request};
use crate::sampler::Sampler;
use futures_channel::mpsc;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::time::Instant;

const BLOCK_TOKENS: usize = 4;

/// A scheduler whose sequences draw token 0 whenever they have logits.
struct Simulation {
    scheduler: Scheduler,
    events: Vec<mpsc::UnboundedReceiver<Event>>,
    n_tokens: Vec<usize>,
    /// Step at which each ticket drew its first token and its last.
    first: BTreeMap<u64, usize>,
    last: BTreeMap<u64, usize>,
    n_steps: usize,
    n_computed: usize,
}

impl Simulation {
    fn new(n_blocks: usize, max_sequences: usize, max_tokens: usize) -> Self {
        let limits = StepLimits {
            max_sequences,
            max_tokens,
            max_prefill_beside_decode: max_tokens.div_ceil(2),
            max_logit_rows: 8,
            speculate: false,
            max_positions: n_blocks * BLOCK_TOKENS,
        };
        Self {
            scheduler: Scheduler::new(BlockPool::new(n_blocks, BLOCK_TOKENS), limits),
            events: Vec::new(),
            n_tokens: Vec::new(),
            first: BTreeMap::new(),
            last: BTreeMap::new(),
            n_steps: 0,
            n_computed: 0,
        }
    }

    fn submit(&mut self, prompt: Vec<u32>, n_new: usize, priority: i32) -> u64 {
        let sampler =
            Sampler::new(&crate::GenerationOptions::greedy(), &prompt, 1_000_000).unwrap();
        let continuation =
            Continuation { sampler, constraint: None, max_tokens: n_new, ending_tokens: vec![] };
        let goal = Goal::Generate(Box::new(continuation));
        let request = Request { tokens: prompt, goal, priority, cache_salt: None };
        let ticket = self.events.len() as u64;
        let (sender, receiver) = mpsc::unbounded();
        self.events.push(receiver);
        self.n_tokens.push(n_new);
        self.scheduler.submit(Sequence::new(request, ticket, Instant::now(), sender));
        ticket
    }

    fn step(&mut self) {
        let (mut batch, mut plan) = (Batch::default(), Vec::new());
        self.scheduler.plan_step(&mut batch, &mut plan, None).unwrap();
        assert!(batch.tokens.len() <= self.scheduler.limits.max_tokens, "the step is too long");
        assert!(!plan.is_empty(), "nobody runs");
        self.n_steps += 1;
        self.n_computed += batch.tokens.len();
        let mut ended = Vec::new();
        for slice in &plan {
            let Scheduler { running, pool, .. } = &mut self.scheduler;
            let sequence = &mut running[slice.sequence];
            sequence.advance(slice.rows.len(), pool);
            if !slice.logit_rows.is_empty() {
                sequence.tokens.push(0);
                let ticket = sequence.ticket;
                self.first.entry(ticket).or_insert(self.n_steps);
                if sequence.n_generated() == self.n_tokens[ticket as usize] {
                    self.last.insert(ticket, self.n_steps);
                    ended.push(slice.sequence);
                }
            }
        }
        ended.sort_unstable();
        for sequence in ended.into_iter().rev() {
            self.scheduler.finish(sequence, Ok(FinishReason::Length));
        }
    }

    fn run(&mut self) {
        while !self.scheduler.is_idle() {
            self.step();
            assert!(self.n_steps < 100_000, "it never ends");
        }
        assert_eq!(self.scheduler.pool.n_available(), self.scheduler.pool.n_blocks());
    }
}

fn prompt(family: u32, length: usize) -> Vec<u32> {
    (0..length as u32).map(|i| family * 100 + i % 90).collect()
}

#[test]
fn short_prompts_do_not_wait_for_a_long_one_nor_the_long_one_for_ever() {
    let mut simulation = Simulation::new(1000, 64, 64);
    let long = simulation.submit(prompt(1, 1000), 1, 0);
    let shorts: Vec<u64> = (2..8).map(|f| simulation.submit(prompt(f, 16), 1, 0)).collect();
    simulation.step();
    simulation.step();
    simulation.step();
    for short in &shorts {
        assert!(simulation.first.contains_key(short), "{:?}", simulation.first);
    }
    // From now on four short prompts arrive with every step: as many as a step can take.
    let mut family = 8;
    while !simulation.first.contains_key(&long) {
        for _ in 0..4 {
            simulation.submit(prompt(family, 16), 1, 0);
            family += 1;
        }
        simulation.step();
        assert!(simulation.n_steps < 1000, "the long prompt starves");
    }
    // A quarter of each step is the long prompt's, whatever else comes.
    assert!(simulation.n_steps <= 1000 / 16 + 8, "{} steps", simulation.n_steps);
    simulation.run();
}

#[test]
fn a_long_prompt_never_stops_those_that_decode() {
    let mut simulation = Simulation::new(1000, 8, 32);
    let talker = simulation.submit(prompt(1, 4), 50, 0);
    simulation.step();
    simulation.submit(prompt(2, 800), 1, 0);
    while !simulation.last.contains_key(&talker) {
        simulation.step();
    }
    assert_eq!(simulation.n_steps, 50, "a token in every step");
    simulation.run();
}

#[test]
fn higher_priorities_enter_and_compute_first() {
    let mut simulation = Simulation::new(1000, 1, 16);
    let tickets: Vec<u64> =
        [0, -1, 2, 1].iter().map(|&p| simulation.submit(prompt(p as u32 % 10, 40), 2, p)).collect();
    simulation.run();
    let order = |ticket: &u64| simulation.first[ticket];
    let mut by_first = tickets.clone();
    by_first.sort_by_key(order);
    assert_eq!(by_first, [2, 3, 0, 1]);

    let mut simulation = Simulation::new(1000, 4, 16);
    let low = simulation.submit(prompt(1, 200), 1, 0);
    simulation.step();
    let high = simulation.submit(prompt(2, 64), 1, 1);
    for _ in 0..4 {
        simulation.step();
    }
    assert!(simulation.first.contains_key(&high), "it took every step's tokens");
    assert!(!simulation.first.contains_key(&low));
    simulation.run();
}

#[test]
fn a_beginning_that_many_share_is_computed_once() {
    let mut simulation = Simulation::new(1000, 8, 64);
    for last in 0..8 {
        let mut prompt = prompt(1, 400);
        prompt.push(last);
        simulation.submit(prompt, 1, 0);
    }
    simulation.run();
    // 400 tokens once, and for each the rest of its last block.
    assert!(simulation.n_computed <= 400 + 8 * BLOCK_TOKENS, "{}", simulation.n_computed);
}

#[test]
fn a_beginning_nobody_computes_any_more_is_not_waited_for() {
    let mut simulation = Simulation::new(1000, 8, 16);
    simulation.submit(prompt(1, 400), 1, 0);
    let second = simulation.submit(prompt(1, 400), 1, 0);
    simulation.step();
    assert_eq!((simulation.scheduler.running.len(), simulation.scheduler.n_waiting()), (1, 1));
    drop(simulation.events.remove(0));
    simulation.scheduler.drop_abandoned();
    simulation.step();
    assert_eq!(simulation.scheduler.running[0].ticket, second);
}

#[test]
fn prompts_that_do_not_fit_together_enter_one_after_the_other() {
    // Room for two prompts of 40 tokens and their answers.
    let mut simulation = Simulation::new(24, 8, 64);
    for family in 1..7 {
        simulation.submit(prompt(family, 40), 4, 0);
    }
    simulation.run();
    assert_eq!(simulation.scheduler.n_preemptions(), 0);
    assert_eq!(simulation.last.len(), 6);
}

proptest! {
    /// Whatever comes, everyone ends, no block is left behind, and steps keep their bounds.
    #[test]
    fn everyone_ends(
        arrivals in prop::collection::vec((0u32..4, 1usize..60, 1usize..20, -1i32..2, 0usize..4), 1..30),
        n_blocks in 20usize..80,
        max_sequences in 1usize..9,
        max_tokens in 1usize..40,
    ) {
        let mut simulation = Simulation::new(n_blocks, max_sequences, max_tokens.max(max_sequences));
        for &(family, length, n_new, priority, pause) in &arrivals {
            simulation.submit(prompt(family, length), n_new, priority);
            for _ in 0..pause {
                if !simulation.scheduler.is_idle() { simulation.step(); }
            }
        }
        simulation.run();
        prop_assert_eq!(simulation.last.len(), arrivals.len());
    }
}
