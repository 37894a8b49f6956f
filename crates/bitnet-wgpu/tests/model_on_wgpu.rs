//! A model on wgpu: how often a token goes to the device, and what happens when the device is lost in
//! the middle of a request. Without a device the tests say so and pass, unless
//! `BITNET_REQUIRE_WGPU` is set.

use bitnet_core::backend::{Batch, SequenceSlice};
use bitnet_inference::testing::{self, placed};
use bitnet_wgpu::WgpuBackend;

fn backend() -> Option<WgpuBackend> {
    match WgpuBackend::new() {
        Ok(backend) => Some(backend),
        Err(error) => {
            let required = std::env::var_os("BITNET_REQUIRE_WGPU").is_some();
            assert!(!required, "a wgpu device is required: {error}");
            eprintln!("SKIPPED, no wgpu device: {error}");
            None
        }
    }
}

#[test]
fn a_token_is_one_submission_and_only_the_best_logits_come_back() {
    let Some(backend) = backend() else { return };
    let traffic = backend.traffic();
    let (mut model, vocab_size) = placed(backend);
    let mut logits = Vec::new();
    let mut step = |tokens: Vec<u32>, first_position: usize, n_best: Option<usize>| {
        let rows = 0..tokens.len();
        let logit_rows = vec![rows.end - 1];
        let sequences = vec![SequenceSlice { rows, first_position, blocks: (0..2).collect() }];
        let batch = Batch { tokens, sequences, logit_rows, n_best, ..Batch::default() };
        let before = (traffic.submissions(), traffic.downloaded_bytes());
        model.execute_batch(&batch, &mut logits).unwrap();
        (traffic.submissions() - before.0, traffic.downloaded_bytes() - before.1)
    };
    assert_eq!(step((1..40).collect(), 0, None), (1, 4 * vocab_size as u64), "a prompt");
    assert_eq!(step(vec![40], 39, Some(1)), (1, 8), "a token");
    assert_eq!(step(vec![41], 40, Some(40)), (1, 320), "a token to be drawn");
    let dispatches = traffic.dispatches();
    let uploaded = traffic.uploaded_bytes();
    step(vec![42], 41, Some(1));
    println!(
        "a token: {} kernels, {} bytes up, 8 bytes down",
        traffic.dispatches() - dispatches,
        traffic.uploaded_bytes() - uploaded
    );
}

fn losable() -> (WgpuBackend, impl Fn()) {
    let backend = WgpuBackend::new().expect("a device was found");
    let lose = backend.loss();
    (backend, lose)
}

#[test]
fn a_device_lost_in_mid_request_ends_on_the_cpu_and_says_so() {
    if backend().is_some() {
        testing::a_lost_device_ends_on_the_cpu_and_says_so(losable);
    }
}

#[test]
fn a_device_lost_in_mid_request_is_a_clean_error_where_nothing_may_take_over() {
    if backend().is_some() {
        testing::a_lost_device_is_a_clean_error(losable);
    }
}
