"""FM and RMT as plain NumPy loops in float64: the oracle of the two systems that the paper compares FAM with.

Written from the specification (Hwang et al., arXiv 2404.09173, App. C.2 and Fig. 7), on top of the primitives of
`reference.py` and importing nothing of the package. One row at a time, block by block, absolute positions, no state
that has to be kept small: everything of the past is there.
"""

import numpy as np
import reference
from reference import attend, fam_positions, finish, norm, project_key_value, project_query


def fm_layer(x, weights, cfg, fam0=None):
    """One layer with feedback memory segments (FM, App. C.2) over one row x [T, D] -> (y [T, D], final memory or None).

    A token reads: the memory of the block before (if F > 0), keys and values projected from this layer's *outputs* in
    the m previous blocks, and keys and values projected from its inputs in its own block, up to itself.
    """
    s, m = cfg["block_size"], cfg["memory_segments"]
    y, memories, fresh = np.zeros_like(x), [] if fam0 is None else [(-1, fam0)], True
    inputs = [project_key_value(x[t : t + 1], [t], weights, cfg) for t in range(len(x))]
    for block in range((len(x) + s - 1) // s):
        keys, values = reference.project_memories(memories[-cfg["num_visible_memories"] :], weights, cfg, 0.0)
        for t in range(max(0, block - m) * s, block * s):  # outputs of whole past blocks, projected afresh
            k, v = project_key_value(y[t : t + 1], [t], weights, cfg)
            keys, values = [*keys, k[0]], [*values, v[0]]
        for t in range(block * s, min((block + 1) * s, len(x))):
            keys, values = [*keys, inputs[t][0][0]], [*values, inputs[t][1][0]]
            seen = slice(None)
            if cfg["attention_window"] is not None:  # for F = 0: the last w keys are those of the last w tokens
                seen = slice(-cfg["attention_window"], None)
            q = project_query(x[t : t + 1], [t], weights, cfg)
            mixed = attend(q, np.stack(keys[seen]), np.stack(values[seen]), cfg)
            y[t] = finish(mixed, x[t : t + 1], weights, cfg)[0]
        if memories and (block + 1) * s <= len(x):
            row = reference.Row(
                count=(block + 1) * s,
                keys=[k[0] for k, _ in inputs],
                values=[v[0] for _, v in inputs],
                memories=memories,
                static=fam0,
                fresh=fresh,
            )
            memories.append((block, reference.write_memory(row, None, weights, cfg, 0.0)[0]))
            fresh = False
    return y, memories[-1][1] if memories else None


def rmt_model(tokens, weights, cfgs):
    """Logits of one row of tokens [T] under RMT (Fig. 7) -> (logits [T, V], the memory M [F, D] after it).

    For each block: read rows, alone; tokens, over the read rows and what a layer of BSWA reads; write rows, if the
    block is complete, over the read rows, one another and the whole block. M_0 is the learned prompt.
    """
    s, f = cfgs[0]["block_size"], cfgs[0]["fam_length"]
    memory, x = np.array(weights["prompt"], dtype="float64"), weights["embedding"][tokens]
    past = [[] for _ in cfgs]  # (key [K, H], value [K, H]) of every token so far, for each layer
    hidden = np.zeros_like(x)
    for block in range((len(tokens) + s - 1) // s):
        places = np.arange(block * s, min((block + 1) * s, len(tokens)))
        before = fam_positions(block - 1, cfgs[0])  # the last F places of the block before
        own = block * s + s - f + np.arange(f)  # the last F places of this block
        read, write, rows = memory, memory, x[places]
        for i, (layer, cfg) in enumerate(zip(weights["layers"], cfgs, strict=True)):
            k_read, v_read = project_key_value(read, before, layer, cfg)
            k_rows, v_rows = project_key_value(rows, places, layer, cfg)
            k_write, v_write = project_key_value(write, own, layer, cfg)
            past[i] += list(zip(k_rows, v_rows, strict=True))
            first = max(0, block - cfg["memory_segments"]) * s
            new = []
            for t in places:
                seen = past[i][first : t + 1]
                keys = np.concatenate([k_read, np.stack([k for k, _ in seen])])
                values = np.concatenate([v_read, np.stack([v for _, v in seen])])
                x_t = rows[t - block * s][None]
                new.append(finish(attend(project_query(x_t, [t], layer, cfg), keys, values, cfg), x_t, layer, cfg)[0])
            q_write = project_query(write, own, layer, cfg)
            keys, values = np.concatenate([k_read, k_write, k_rows]), np.concatenate([v_read, v_write, v_rows])
            write = finish(attend(q_write, keys, values, cfg), write, layer, cfg)
            q_read = project_query(read, before, layer, cfg)
            read = finish(attend(q_read, k_read, v_read, cfg), read, layer, cfg)
            rows = np.stack(new)
        hidden[places] = rows
        if len(places) == s:  # a block that is not complete writes nothing
            memory = write
            if cfgs[0]["memory_update"] == "normalized":
                memory = reference.rms_norm(memory, 1.0, 1e-6)
    head = weights["head_kernel"] if "head_kernel" in weights else weights["embedding"].T
    return norm(hidden, weights, cfgs[-1], "final_norm") @ head, memory
