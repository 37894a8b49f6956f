// A product is multiplied with the activation of the gate's product.
@group(0) @binding(5) var<storage, read> gate: array<f32>;

fn activate(x: f32) -> f32 {
    if p.activation == 0u {
        let positive = max(x, 0.0);
        return positive * positive;
    }
    // Beyond this the quotient is 0, and the exponential would be infinite.
    return x / (1.0 + exp(min(-x, 88.0)));
}

fn store(at: u32, value: f32) {
    outputs[at] = activate(gate[at]) * value;
}
