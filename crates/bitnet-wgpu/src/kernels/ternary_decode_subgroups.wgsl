// Folds the lanes' sums inside subgroups of whatever size, then those of the subgroups. Integers add
// up to the same in any order.

var<workgroup> partial: array<array<i32, LANES>, ROWS>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) n_subgroups: u32,
    @builtin(subgroup_invocation_id) subgroup_lane: u32,
) {
    let first_row = group.x * ROWS;
    var sums = partial_sums(first_row, group.y, lane);
    for (var r = 0u; r < ROWS; r++) {
        let sum = subgroupAdd(sums[r]);
        if subgroup_lane == 0u {
            partial[r][subgroup] = sum;
        }
    }
    workgroupBarrier();
    if lane < ROWS && first_row + lane < p.rows {
        var sum = 0;
        for (var s = 0u; s < n_subgroups; s++) {
            sum += partial[lane][s];
        }
        finish(first_row + lane, group.y, sum);
    }
}
