//! Prompts taken over from another sequence of the cache.

/// The first `length[s]` slots of sequence s become those of sequence `origin[s]`; `cache` is `[layers, S, heads,
/// capacity, slot]` in this order.
pub fn repeat_slots<T: Copy>(
    cache: &mut [T],
    (layers, heads, capacity, slot): (usize, usize, usize, usize),
    origin: &[u32],
    length: &[u32],
) {
    let sequences = origin.len();
    let start = |layer, sequence, head| ((layer * sequences + sequence) * heads + head) * capacity * slot;
    for layer in 0..layers {
        for (sequence, (&from, &length)) in origin.iter().zip(length).enumerate() {
            for head in 0..heads {
                let first = start(layer, from as usize, head);
                cache.copy_within(first..first + length as usize * slot, start(layer, sequence, head));
            }
        }
    }
}
