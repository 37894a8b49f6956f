//! The conformance suite of bitnet-core on MLX. Needs mlx-c: `scripts/test-mlx.sh` has it built and
//! runs these.

use bitnet_core::testing::conformance;
use bitnet_mlx::MlxBackend;

#[test]
#[ignore = "needs mlx-c: scripts/test-mlx.sh"]
fn mlx_conforms() {
    conformance(|| MlxBackend::new().unwrap());
}
