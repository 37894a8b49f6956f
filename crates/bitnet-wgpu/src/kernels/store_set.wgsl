// A product replaces what was there.
fn store(at: u32, value: f32) {
    outputs[at] = value;
}
