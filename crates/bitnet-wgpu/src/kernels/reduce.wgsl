// Folds one value of each lane of a workgroup in a fixed tree, so that a float sum is the same
// whatever the hardware's subgroups are. Needs `const LANES`, a power of two.

var<workgroup> lanes_f32: array<f32, LANES>;
var<workgroup> lanes_u32: array<u32, LANES>;

fn sum_lanes(lane: u32, value: f32) -> f32 {
    lanes_f32[lane] = value;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half >>= 1u) {
        if lane < half {
            lanes_f32[lane] += lanes_f32[lane + half];
        }
        workgroupBarrier();
    }
    let total = lanes_f32[0];
    workgroupBarrier();
    return total;
}

fn max_lanes_u32(lane: u32, value: u32) -> u32 {
    lanes_u32[lane] = value;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half >>= 1u) {
        if lane < half {
            lanes_u32[lane] = max(lanes_u32[lane], lanes_u32[lane + half]);
        }
        workgroupBarrier();
    }
    let largest = lanes_u32[0];
    workgroupBarrier();
    return largest;
}

// Wraps around as two's complement does, so it serves signed sums too.
fn sum_lanes_u32(lane: u32, value: u32) -> u32 {
    lanes_u32[lane] = value;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half >>= 1u) {
        if lane < half {
            lanes_u32[lane] += lanes_u32[lane + half];
        }
        workgroupBarrier();
    }
    let total = lanes_u32[0];
    workgroupBarrier();
    return total;
}
