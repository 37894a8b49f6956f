// A product is added to the residual stream.
fn store(at: u32, value: f32) {
    outputs[at] = outputs[at] + value;
}
