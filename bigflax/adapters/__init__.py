"""PEFT's own folders in and out: adapter_config.json and adapter_model.safetensors. Neither PEFT nor PyTorch is needed.

    params = load_adapter(model, params, "folder")       the adapter's typed weights (weights.py) upon the base's
    save_adapter(model, params, "folder")                PEFT on PyTorch loads it and gives the same outputs

Of a module y = W x (+ bias) with `in` inputs and `out` outputs, a folder holds

    LORA    lora_A [r, in], lora_B [out, r]                     W + B A alpha / r, or alpha / sqrt(r) with `use_rslora`
            lora_embedding_A [r, V], lora_embedding_B [D, r]    the same of a table [V, D]
            lora_magnitude_vector [out]                         DoRA, with `use_dora`
    IA3     ia3_l [out, 1]                                      l y, the bias in it
            ia3_l [1, in]                                       W (l x), of `feedforward_modules`

each module under its name of models/names.py; ranks and alphas that differ stand in `rank_pattern` and `alpha_pattern`. What trains whole beside them, a
head of classes, is written as it is (`modules_to_save`).

One leaf of ours is a module of all layers, or a part of one that the file joins (GPT-2's c_attn, GPT-NeoX's query_key_value, Phi-3's qkv_proj). In: the
layers' ranks are filled up by zeros to the largest, which stay zeros in training, and scales that differ are multiplied into B; joined parts
get one A and their rows of B. Out: parts that still have one A are joined again; others as [A1; A2] and a B of blocks, of the sum of the ranks. Both are exact.

Sources: github.com/huggingface/peft, version 0.21, whose names and fields these are.
Left out on purpose: methods that PEFT has and weights.py has not, experts of mixtures (PEFT's joined experts are no modules), pickled files, and
initializations that change the base (PiSSA, OLoRA), which PEFT itself can convert to plain LoRA.
"""

from bigflax.adapters.reading import load_adapter
from bigflax.adapters.writing import save_adapter

__all__ = ["load_adapter", "save_adapter"]
