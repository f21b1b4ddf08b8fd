"""An LLM family: Mistral, as its models without sliding windows are (v0.2 and later).

Its layer is Llama's; what differs is said in config.json. With this file an imported Mistral is the
start of a stage, and what was trained is exported with transformers' own Mistral inside:

    hovle train --config=configs/stage1_distill.py:hovle_2b --workdir=runs/stage1 \
        --config.model.plugins="('examples/llm_family.py',)" --config.model.llm_family=mistral \
        --config.init.llm=MISTRAL_DIR ...
"""

from hovle_jax.hf.families import FAMILIES, Family, llama_layers

FAMILIES.add("mistral")(
    Family(
        architecture="MistralForCausalLM",
        layers=llama_layers,  # a family with other tensors has rows of its own (hf/rows.py)
        keys={"sliding_window": None},  # another value in config.json is refused, with its name
    )
)
