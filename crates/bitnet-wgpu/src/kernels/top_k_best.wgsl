// Of what an earlier run found.
@group(0) @binding(0) var<storage, read> numbers: array<vec2<u32>>;

fn number(at: u32) -> u32 {
    return numbers[at].x;
}

fn index(of_row: u32, at: u32) -> u32 {
    return numbers[at].y;
}
