// Of the logits themselves.
@group(0) @binding(0) var<storage, read> numbers: array<u32>;

fn number(at: u32) -> u32 {
    return numbers[at];
}

fn index(of_row: u32, at: u32) -> u32 {
    return of_row;
}
