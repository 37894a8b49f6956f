//! Order, back-pressure, fairness, bounded memory, and the ways to end.

use super::*;

fn engine() -> (InferenceEngine, Model) {
    let engine = InferenceEngine::builder().threads(1).build_blocking().unwrap();
    let model = engine.load_model_blocking("builtin").unwrap();
    (engine, model)
}

fn processor(workers: usize, queue_capacity: usize) -> ParallelInferenceProcessor {
    let (engine, model) = engine();
    let config = ParallelConfig { workers, queue_capacity };
    ParallelInferenceProcessor::new(&engine, &model, config).unwrap()
}

fn endless() -> GenerationOptions {
    GenerationOptions::greedy().max_tokens(900).ignore_eos(true)
}

#[test]
fn results_come_in_order_and_every_worker_works() {
    let processor = processor(4, 8);
    let inputs: Vec<InferenceInput> =
        (0..200u32).map(|n| InferenceInput::Tokens((n..=n + n * 7 % 30).collect())).collect();
    let outputs = processor.infer_all(inputs.clone());
    for (input, output) in inputs.iter().zip(outputs) {
        let InferenceInput::Tokens(tokens) = input else { unreachable!() };
        assert_eq!(output.unwrap().n_tokens, tokens.len());
    }
    // The last one's count is written just after its result is sent.
    let mut statistics = processor.statistics();
    while statistics.in_work > 0 {
        statistics = processor.statistics();
    }
    assert_eq!(statistics.finished.iter().sum::<u64>(), 200);
    assert!(statistics.finished.iter().all(|&n| n >= 10), "{statistics:?}");

    let options = GenerationOptions::default().seed(2).max_tokens(4);
    let answers: Vec<_> = processor.generate_all(inputs[..20].to_vec(), &options).collect();
    for (input, answer) in inputs.iter().zip(answers) {
        let alone =
            processor.engine.generate_blocking(&processor.model, input.clone(), &options).unwrap();
        assert_eq!(answer.unwrap().tokens, alone.tokens);
    }
}

#[test]
fn a_full_queue_pushes_back() {
    let processor = processor(1, 2);
    let mut held = Vec::new();
    let refused = loop {
        match processor.try_submit_generation(vec![1].into(), &endless()) {
            Ok(pending) => held.push(pending),
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, InferenceError::Concurrency { .. }), "{refused}");
    assert!((2..=3).contains(&held.len()), "one in work, two waiting");
    // Room appears when somebody gives up; a submission that waits gets it.
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| processor.submit(vec![1].into()).unwrap().wait());
        drop(held);
        assert_eq!(waiting.join().unwrap().unwrap().n_tokens, 1);
    });
}

#[test]
fn bad_inputs_are_their_own_errors() {
    let processor = processor(2, 4);
    let inputs = [vec![1, 2].into(), vec![70_000].into(), "".into(), vec![3].into()];
    let outcomes: Vec<bool> = processor.infer_all(inputs).map(|result| result.is_ok()).collect();
    assert_eq!(outcomes, [true, false, false, true]);
}

#[test]
fn a_hundred_thousand_inputs_take_constant_memory() {
    let processor = processor(8, 16);
    let most_ahead = std::cell::Cell::new(0);
    let taken = std::cell::Cell::new(0usize);
    let inputs = (0..100_000u32).map(|n| {
        taken.set(taken.get() + 1);
        // Outside the vocabulary: refused before the model, which would take minutes for all.
        InferenceInput::Tokens(vec![if n % 1000 == 0 { 5 } else { 70_000 }])
    });
    let mut n_good = 0;
    for (done, output) in processor.infer_all(inputs).enumerate() {
        n_good += usize::from(output.is_ok());
        most_ahead.set(most_ahead.get().max(taken.get() - done));
    }
    assert_eq!((taken.get(), n_good), (100_000, 100));
    assert!(most_ahead.get() <= 8 + 16, "{} inputs were held", most_ahead.get());
}

#[test]
fn shutdown_finishes_what_it_can_and_cancels_the_rest() {
    let processor = processor(2, 8);
    let quick: Vec<_> = (0..6).map(|_| processor.submit(vec![1, 2].into()).unwrap()).collect();
    let ended = processor.shutdown(Duration::from_secs(60));
    assert_eq!(ended.cancelled, 0);
    assert!(quick.into_iter().all(|pending| pending.wait().is_ok()));

    let processor = self::processor(2, 8);
    let (model, shared) = (processor.model.clone(), Arc::downgrade(&processor.shared));
    let slow: Vec<_> =
        (0..6).map(|_| processor.submit_generation(vec![1].into(), &endless()).unwrap()).collect();
    while processor.statistics().in_work < 2 {
        std::thread::yield_now();
    }
    let started = Instant::now();
    let ended = processor.shutdown(Duration::from_millis(20));
    assert!(started.elapsed() < Duration::from_secs(30));
    assert_eq!(ended.finished + ended.cancelled, 6);
    assert!(ended.cancelled >= 4, "{ended:?}");
    for pending in slow {
        assert!(matches!(pending.wait(), Err(InferenceError::Concurrency { .. })));
    }
    assert_eq!(shared.strong_count(), 0, "no thread is left");
    // The model has stopped computing for them.
    while model.stats().running > 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn dropping_it_cancels_everything() {
    let processor = processor(2, 8);
    let pending = processor.submit_generation(vec![1].into(), &endless()).unwrap();
    let shared = Arc::downgrade(&processor.shared);
    drop(processor);
    assert!(pending.wait().is_err());
    assert_eq!(shared.strong_count(), 0);
}

#[test]
fn bounds_outside_their_range_are_refused() {
    let (engine, model) = engine();
    for (workers, queue_capacity) in [(0, 1), (1, 0), (5000, 1), (1, usize::MAX)] {
        let config = ParallelConfig { workers, queue_capacity };
        let refused = ParallelInferenceProcessor::new(&engine, &model, config);
        assert!(matches!(refused, Err(InferenceError::Input { .. })), "{config:?}");
    }
}
