// The input of a projection after up to two root-mean-square norms: the block's and the
// projection's own. Needs `const LANES`, the folds, and `cols`, `norms`, `eps0`, `eps1` in `p`.

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> norm0: array<f32>;
@group(0) @binding(2) var<storage, read> norm1: array<f32>;

var<private> row_start: u32;
var<private> factor0: f32;
var<private> factor1: f32;

fn after_first(col: u32) -> f32 {
    let value = x[row_start + col];
    if (p.norms & 1u) == 0u {
        return value;
    }
    return value * factor0 * norm0[col];
}

fn normed(col: u32) -> f32 {
    let value = after_first(col);
    if (p.norms & 2u) == 0u {
        return value;
    }
    return value * factor1 * norm1[col];
}

// Computes the factors; all lanes of the workgroup come here together.
fn prepare_norms(lane: u32, row: u32) {
    row_start = row * p.cols;
    if (p.norms & 1u) != 0u {
        var squares = 0.0;
        for (var col = lane; col < p.cols; col += LANES) {
            let value = x[row_start + col];
            squares += value * value;
        }
        factor0 = 1.0 / sqrt(sum_lanes(lane, squares) / f32(p.cols) + p.eps0);
    }
    if (p.norms & 2u) != 0u {
        var squares = 0.0;
        for (var col = lane; col < p.cols; col += LANES) {
            let value = after_first(col);
            squares += value * value;
        }
        factor1 = 1.0 / sqrt(sum_lanes(lane, squares) / f32(p.cols) + p.eps1);
    }
}
