// Folds the lanes' sums through workgroup memory: for devices without subgroups.

var<workgroup> partial: array<array<i32, LANES>, ROWS>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let first_row = group.x * ROWS;
    var sums = partial_sums(first_row, group.y, lane);
    for (var r = 0u; r < ROWS; r++) {
        partial[r][lane] = sums[r];
    }
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half >>= 1u) {
        if lane < half {
            for (var r = 0u; r < ROWS; r++) {
                partial[r][lane] += partial[r][lane + half];
            }
        }
        workgroupBarrier();
    }
    if lane < ROWS && first_row + lane < p.rows {
        finish(first_row + lane, group.y, partial[lane][0]);
    }
}
