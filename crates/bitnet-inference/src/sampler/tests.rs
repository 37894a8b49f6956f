//! Filters against their definitions in plain f64, penalties by hand, draws by frequency.

use proptest::prelude::*;

use super::*;
use crate::options::DryOptions;

/// Options that change nothing but the temperature.
fn plain() -> GenerationOptions {
    GenerationOptions::new().temperature(1.0).top_k(0).top_p(1.0).min_p(0.0).seed(1)
}

fn sampler(options: GenerationOptions, prompt: &[u32], vocab: usize) -> Sampler {
    Sampler::new(&options, prompt, vocab).unwrap()
}

/// The logits after biases and penalties.
fn adjusted(options: GenerationOptions, prompt: &[u32], then: &[u32], logits: &[f32]) -> Vec<f32> {
    let mut sampler = sampler(options, prompt, logits.len());
    then.iter().for_each(|&token| sampler.accept(token));
    let mut logits = logits.to_vec();
    sampler.adjust(&mut logits);
    logits
}

fn candidates(logits: &[f32]) -> Vec<Candidate> {
    let mut candidates = Vec::new();
    filters::top_k(logits, 0, &mut candidates);
    candidates
}

fn ids(candidates: &[Candidate]) -> Vec<u32> {
    candidates.iter().map(|c| c.id).collect()
}

/// Softmax in f64.
fn probabilities(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let weights: Vec<f64> = logits.iter().map(|&l| (l as f64 - max).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.into_iter().map(|w| w / total).collect()
}

/// Asserts that `kept` is the start of `order` that just reaches `mass`; a cut within 1e-5 of
/// the border is accepted on either side.
fn assert_reaches(kept: &[u32], order: &[u32], p: &[f64], mass: f64) {
    assert!(!kept.is_empty());
    assert_eq!(kept, &order[..kept.len()]);
    let sum = |ids: &[u32]| ids.iter().map(|&id| p[id as usize]).sum::<f64>();
    assert!(sum(kept) >= mass - 1e-5 || kept.len() == order.len());
    assert!(sum(&kept[..kept.len() - 1]) < mass + 1e-5);
}

fn by_logit(logits: &[f32]) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    ids.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
    ids
}

/// Logits on a coarse grid, so that ties are common.
fn logits() -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec((-40..40_i32).prop_map(|l| l as f32 * 0.25), 1..600)
}

proptest! {
    #[test]
    fn top_k_is_the_start_of_the_sorted_vocabulary(logits in logits(), k in 1..700_usize) {
        let mut kept = Vec::new();
        filters::top_k(&logits, k, &mut kept);
        let mut kept = ids(&kept);
        if k >= logits.len() {
            kept.sort_unstable();
            prop_assert_eq!(kept, (0..logits.len() as u32).collect::<Vec<_>>());
        } else {
            prop_assert_eq!(&kept[..], &by_logit(&logits)[..k]);
        }
    }

    #[test]
    fn top_p_is_the_shortest_likeliest_run(logits in logits(), p in 0.0..1.0_f32) {
        let mut kept = candidates(&logits);
        filters::top_p(&mut kept, p);
        assert_reaches(&ids(&kept), &by_logit(&logits), &probabilities(&logits), p as f64);
    }

    #[test]
    fn min_p_keeps_what_is_likely_enough(logits in logits(), p in 0.0..=1.0_f32) {
        let mut kept = candidates(&logits);
        filters::min_p(&mut kept, p);
        let all = probabilities(&logits);
        let best = all.iter().copied().fold(0.0, f64::max);
        for (id, &of) in all.iter().enumerate() {
            let is_kept = kept.iter().any(|c| c.id as usize == id);
            let ratio = of / best;
            prop_assert!((ratio - p as f64).abs() < 1e-6 || is_kept == (ratio > p as f64));
        }
    }

    #[test]
    fn typical_keeps_the_least_surprising_surprises(
        // Distinct logits: equal distances would leave the order to rounding.
        logits in prop::collection::btree_set(-4000..4000_i32, 1..300)
            .prop_map(|set| set.into_iter().map(|l| l as f32 * 0.01).collect::<Vec<_>>())
            .prop_shuffle(),
        mass in 0.0..1.0_f32,
    ) {
        let p = probabilities(&logits);
        let entropy: f64 = p.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
        let ln_total = logits.iter().map(|&l| (l as f64 - max).exp()).sum::<f64>().ln();
        let distance = |id: u32| (ln_total - (logits[id as usize] as f64 - max) - entropy).abs();
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|&a, &b| distance(a).total_cmp(&distance(b)));
        let close = |pair: &[u32]| (distance(pair[0]) - distance(pair[1])).abs() < 1e-4;
        prop_assume!(!order.windows(2).any(close));
        let mut kept = candidates(&logits);
        filters::typical(&mut kept, mass);
        assert_reaches(&ids(&kept), &order, &p, mass as f64);
    }

    #[test]
    fn a_draw_from_all_is_a_draw_from_a_list_of_all(
        logits in prop::collection::vec((-4000..4000_i32).prop_map(|l| l as f32 * 0.01), 1..2000),
        temperature in 0.01..3.0_f32, seed: u64,
    ) {
        let noise = Noise::new(key(seed, 0), temperature);
        let drawn = filters::draw_among_all(&logits, noise);
        prop_assert_eq!(drawn, filters::draw(&candidates(&logits), noise));
    }

    #[test]
    fn logprobs_are_the_log_softmax_of_what_the_model_said(
        logits in logits(),
        n in 0..20_u32,
        temperature in 0.0..2.0_f32,
    ) {
        let options = GenerationOptions::new().temperature(temperature).seed(3).logprobs(n)
            .logit_bias(0, 5.0);
        let mut scratch = logits.clone();
        let sampled = sampler(options, &[], logits.len()).sample(&mut scratch).unwrap();
        prop_assert_eq!(&scratch, &logits, "the row is restored");
        let p = probabilities(&logits);
        let ln = |id: u32| p[id as usize].ln();
        prop_assert!((sampled.logprob.unwrap() as f64 - ln(sampled.token)).abs() < 1e-4);
        let order = by_logit(&logits);
        if (n as usize) < logits.len() {
            let top: Vec<u32> = sampled.top.iter().map(|t| t.0).collect();
            prop_assert_eq!(&top[..], &order[..n as usize]);
        }
        for (id, logprob) in sampled.top {
            prop_assert!((logprob as f64 - ln(id)).abs() < 1e-4);
        }
    }

    #[test]
    fn no_row_of_floats_panics_or_draws_an_illegal_token(
        bits in prop::collection::vec(any::<u32>(), 1..80),
        temperature in prop_oneof![Just(0.0_f32), 1e-30..2.0_f32, Just(f32::MIN_POSITIVE)],
        top_k in 0..10_u32, top_p in 0.0..=1.0_f32, typical_p in 0.0..=1.0_f32,
        min_p in 0.0..=1.0_f32, penalty in 0.1..3.0_f32, seed: u64,
    ) {
        // Every bit pattern, with infinities and NaN made common.
        let row = |b: &u32| match b % 5 {
            0 => f32::NEG_INFINITY,
            1 => [f32::NAN, f32::INFINITY, f32::MAX, f32::MIN][(b / 5 % 4) as usize],
            _ => f32::from_bits(*b),
        };
        let mut logits: Vec<f32> = bits.iter().map(row).collect();
        let options = GenerationOptions::new().temperature(temperature).top_k(top_k).top_p(top_p)
            .typical_p(typical_p).min_p(min_p).repetition_penalty(penalty, 8)
            .frequency_penalty(1.0).dry(DryOptions::default()).logprobs(5).seed(seed);
        let mut sampler = sampler(options, &[0], logits.len());
        let before: Vec<u32> = logits.iter().map(|l| l.to_bits()).collect();
        for _ in 0..4 {
            match sampler.sample(&mut logits) {
                Ok(sampled) => {
                    prop_assert!(logits[sampled.token as usize] > f32::NEG_INFINITY);
                    sampler.accept(sampled.token);
                }
                Err(error) => {
                    let want = match logits.iter().any(|l| l.is_nan()) {
                        true => SampleError::NotANumber,
                        false => SampleError::NoLegalToken { vocab: before.len() },
                    };
                    prop_assert_eq!(error, want);
                }
            }
            prop_assert!(logits.iter().map(|l| l.to_bits()).eq(before.iter().copied()));
        }
    }

    #[test]
    fn rollback_is_the_inverse_of_accept(
        prompt in prop::collection::vec(0..6_u32, 0..12),
        kept in prop::collection::vec(0..6_u32, 0..12),
        tried in prop::collection::vec(0..6_u32, 0..12),
        window in 0..10_u32,
    ) {
        let options = GenerationOptions::new().repetition_penalty(1.3, window).seed(5)
            .frequency_penalty(0.4).presence_penalty(0.2).dry(DryOptions::default());
        let mut straight = sampler(options.clone(), &prompt, 6);
        kept.iter().for_each(|&t| straight.accept(t));
        let mut detour = sampler(options, &prompt, 6);
        kept.iter().for_each(|&t| detour.accept(t));
        tried.iter().for_each(|&t| detour.accept(t));
        detour.rollback(tried.len());
        let logits = [0.5, 0.1, -0.3, 0.9, 0.2, 0.0];
        let (mut a, mut b) = (logits, logits);
        straight.adjust(&mut a);
        detour.adjust(&mut b);
        prop_assert_eq!(a, b);
        straight.undo.clear();
        detour.undo.clear();
        prop_assert_eq!(straight.sample(&mut logits.clone()), detour.sample(&mut logits.clone()));
    }
}

#[test]
fn greedy_takes_the_largest_and_the_first_of_equals() {
    let mut greedy = sampler(GenerationOptions::greedy(), &[], 5);
    let mut token = |mut logits: [f32; 5]| greedy.sample(&mut logits).unwrap().token;
    assert_eq!(token([0.0, 3.0, -1.0, 3.0, 2.0]), 1);
    assert_eq!(token([f32::NAN, -3.0, f32::NAN, -2.0, f32::NEG_INFINITY]), 3);
    assert_eq!(token([0.0, f32::MAX, f32::INFINITY, 3.0, f32::INFINITY]), 2);
}

#[test]
fn without_a_legal_token_sampling_ends_with_an_error() {
    for options in [GenerationOptions::greedy(), plain(), GenerationOptions::new()] {
        let ban = |o: GenerationOptions, id| o.logit_bias(id, BAN_BIAS);
        let banned = (0..3).fold(options.clone(), ban);
        let error = SampleError::NoLegalToken { vocab: 3 };
        assert_eq!(sampler(banned, &[], 3).sample(&mut [1.0, 2.0, 3.0]), Err(error.clone()));
        let mut none = [f32::NAN, f32::NEG_INFINITY, f32::NAN];
        assert_eq!(
            sampler(options.clone(), &[], 3).sample(&mut none),
            Err(SampleError::NotANumber)
        );
        let mut none = [f32::NEG_INFINITY; 3];
        assert_eq!(sampler(options, &[], 3).sample(&mut none), Err(error));
    }
    let wrong = sampler(plain(), &[], 3).sample(&mut [0.0; 4]);
    assert_eq!(wrong, Err(SampleError::WrongLength { expected: 3, got: 4 }));
}

#[test]
fn tokens_outside_the_vocabulary_are_refused() {
    let biased = GenerationOptions::new().logit_bias(10, 1.0);
    let error = Sampler::new(&biased, &[], 10).unwrap_err();
    assert_eq!((error.field, error.got.as_str()), ("logit_bias", "10"));
    assert_eq!(Sampler::new(&plain(), &[3, 4], 4).unwrap_err().field, "prompt");
    assert_eq!(Sampler::new(&plain().top_p(2.0), &[], 4).unwrap_err().field, "top_p");
}

#[test]
fn penalties_by_hand() {
    let logits = [2.0, -2.0, 1.0, 0.5];
    // Repetition: positive logits shrink, negative ones fall; prompt and answer both count.
    let repetition = plain().repetition_penalty(2.0, 64);
    assert_eq!(adjusted(repetition.clone(), &[0], &[1, 1], &logits), [1.0, -4.0, 1.0, 0.5]);
    // A window of one sees the last token only.
    let short = plain().repetition_penalty(2.0, 1);
    assert_eq!(adjusted(short, &[0], &[1, 2], &logits), [2.0, -2.0, 0.5, 0.5]);
    let off = plain().repetition_penalty(2.0, 0);
    assert_eq!(adjusted(off, &[0], &[1], &logits), logits);
    // Presence and frequency count the answer, not the prompt.
    let presence = plain().presence_penalty(0.5).frequency_penalty(0.25);
    assert_eq!(adjusted(presence, &[3], &[0, 1, 1], &logits), [1.25, -3.0, 1.0, 0.5]);
    // Bias comes first, so the penalty works on the biased logit.
    let biased = repetition.logit_bias(0, 4.0).logit_bias(2, -100.0);
    assert_eq!(adjusted(biased, &[0], &[], &logits), [3.0, -2.0, f32::NEG_INFINITY, 0.5]);
    // DRY: after 0 1 2 0 1, a 2 continues the repetition.
    let dry = DryOptions { multiplier: 3.0, ..DryOptions::default() };
    let options = plain().dry(dry);
    assert_eq!(adjusted(options.clone(), &[0, 1, 2], &[0, 1], &logits), [2.0, -2.0, -2.0, 0.5]);
    let mut broken = sampler(options, &[0, 1, 2, 0, 1], 4).with_dry_breakers([1]);
    let mut row = logits;
    broken.adjust(&mut row);
    assert_eq!(row, logits);
}

#[test]
fn draws_follow_the_distribution() {
    let row = [1.0_f32, 0.0, 2.0, -1.0, 0.5];
    for (temperature, top_k) in [(1.0_f32, 0_u32), (0.7, 0), (1.5, 3)] {
        let mut sampler = sampler(plain().temperature(temperature).top_k(top_k), &[], row.len());
        let n = 20_000;
        let mut counts = [0_u32; 5];
        for _ in 0..n {
            let token = sampler.sample(&mut row.clone()).unwrap().token;
            counts[token as usize] += 1;
            sampler.accept(token);
        }
        let scaled: Vec<f32> = row
            .iter()
            .enumerate()
            .map(|(id, l)| match top_k == 0 || by_logit(&row)[..3].contains(&(id as u32)) {
                true => l / temperature,
                false => f32::NEG_INFINITY,
            })
            .collect();
        for (p, count) in probabilities(&scaled).into_iter().zip(counts) {
            // Five standard deviations of a binomial count; the seed is fixed, so this is stable.
            let deviation = (n as f64 * p * (1.0 - p)).sqrt();
            assert!((count as f64 - n as f64 * p).abs() <= 5.0 * deviation);
        }
    }
}

#[test]
fn the_stream_of_a_seed_is_fixed_for_ever() {
    // The upper 53 bits of each key, computed by an independent ChaCha8 with key 42 and nonce 0.
    let draw = |[low, high]: [u32; 2]| (u64::from(low) | u64::from(high) << 32) >> 11;
    let draws: Vec<u64> = (0..4).map(|i| draw(key(42, i))).collect();
    let stream = [3136797389566453, 2573343958160318, 4444804812152722, 3313679161547230];
    assert_eq!(draws, stream);
    let mut sampler = sampler(plain().seed(42), &[], 100);
    let tokens: Vec<u32> = (0..8)
        .map(|_| {
            let token = sampler.sample(&mut [0.0; 100]).unwrap().token;
            sampler.accept(token);
            token
        })
        .collect();
    // As a program that computes the noise in double precision draws them.
    assert_eq!(tokens, [97, 74, 92, 6, 37, 39, 22, 3]);
}

#[test]
fn a_draw_depends_on_seed_and_position_alone() {
    let row = [0.0; 50];
    let mut first = sampler(plain().seed(9), &[1, 2], 50);
    let again = first.sample(&mut row.clone());
    assert_eq!(first.sample(&mut row.clone()), again, "no accept, no step");
    // Another prompt and forced tokens do not move the stream.
    let mut second = sampler(plain().seed(9), &[], 50);
    assert_eq!(second.sample(&mut row.clone()), again);
    first.accept(3);
    second.accept(44);
    assert_eq!(first.sample(&mut row.clone()), second.sample(&mut row.clone()));
    first.accept(5);
    first.rollback(2);
    assert_eq!(first.sample(&mut row.clone()), again);
    assert_eq!(first.n_accepted(), 0);
}

#[test]
fn without_a_seed_requests_differ() {
    let options = GenerationOptions::new();
    let seeds: HashSet<u64> = (0..8).map(|_| sampler(options.clone(), &[], 4).seed()).collect();
    assert!(seeds.len() > 1);
}

/// Not a test of speed: prints what a row of a 128k vocabulary costs, for whoever asks.
#[test]
#[ignore = "prints timings: cargo test --release -p bitnet-inference sampling_cost -- --ignored --nocapture"]
fn sampling_cost() {
    let vocab = 128_256;
    let mut logits: Vec<f32> =
        (0..vocab).map(|i| key(1, i)[0] as f32 * (30.0 / 4_294_967_296.0) - 20.0).collect();
    for (name, options) in [
        ("greedy", GenerationOptions::greedy()),
        ("default", GenerationOptions::new().seed(1)),
        ("all tokens", plain()),
        ("top-p alone", plain().top_p(0.95)),
        ("typical alone", plain().typical_p(0.9)),
        ("greedy with logprobs", GenerationOptions::greedy().logprobs(5)),
    ] {
        let mut sampler = sampler(options, &[], vocab);
        let start = std::time::Instant::now();
        for _ in 0..100 {
            let token = sampler.sample(&mut logits).unwrap().token;
            sampler.accept(token);
        }
        println!("{name}: {:?} per token", start.elapsed() / 100);
    }
}
