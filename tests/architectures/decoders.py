"""Decoder-only language models as prefill: one pass over the prompt, no cache."""

from tests.architectures.base import HIDDEN, IDS, TEXT, Settings, hugging_face, texts

_DECODER: Settings = {**TEXT, "use_cache": False}
_GROUPED: Settings = {
    **_DECODER,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_GPT: Settings = {
    **IDS,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 2,
    "n_positions": 66,
    "use_cache": False,
}
_SLIDING: Settings = {**_GROUPED, "sliding_window": 8}
_GEMMA: Settings = {**_SLIDING, "query_pre_attn_scalar": 8}
_EAGER: Settings = {"attn_implementation": "eager"}

_ROWS: tuple[tuple[str, str, Settings], ...] = (
    ("gpt2", "GPT2LMHeadModel", _GPT),
    ("gpt2-eager", "GPT2LMHeadModel", {**_GPT, **_EAGER}),
    (
        "gpt-neo",
        "GPTNeoForCausalLM",
        {
            **_DECODER,
            "num_hidden_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
        },
    ),
    ("gpt-neox", "GPTNeoXForCausalLM", _DECODER),
    ("gptj", "GPTJForCausalLM", {**_GPT, "rotary_dim": 8}),
    ("codegen", "CodeGenForCausalLM", {**_GPT, "n_head": 4, "rotary_dim": 4}),
    ("gpt-bigcode", "GPTBigCodeForCausalLM", _GPT),
    ("openai-gpt", "OpenAIGPTLMHeadModel", _GPT),
    (
        "opt",
        "OPTForCausalLM",
        {**_DECODER, "ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    ("bloom", "BloomForCausalLM", {**_DECODER, "n_layer": 3, "n_head": 2}),
    (
        "mpt",
        "MptForCausalLM",
        {**IDS, "d_model": 32, "n_heads": 2, "n_layers": 3, "max_seq_len": 66, "use_cache": False},
    ),
    ("llama", "LlamaForCausalLM", _GROUPED),
    ("llama-eager", "LlamaForCausalLM", {**_GROUPED, **_EAGER}),
    ("mistral", "MistralForCausalLM", _SLIDING),
    ("qwen2", "Qwen2ForCausalLM", _GROUPED),
    ("qwen3", "Qwen3ForCausalLM", _GROUPED),
    ("gemma", "GemmaForCausalLM", _GROUPED),
    ("gemma2", "Gemma2ForCausalLM", _GEMMA),
    ("gemma3", "Gemma3ForCausalLM", _GEMMA),
    ("phi", "PhiForCausalLM", _DECODER),
    ("phi3", "Phi3ForCausalLM", {**_GROUPED, "sliding_window": None}),
    ("falcon", "FalconForCausalLM", {**_DECODER, "multi_query": True, "alibi": False}),
    ("stablelm", "StableLmForCausalLM", _GROUPED),
    ("olmo", "OlmoForCausalLM", _GROUPED),
    ("olmo2", "Olmo2ForCausalLM", _GROUPED),
    ("cohere", "CohereForCausalLM", _GROUPED),
    ("granite", "GraniteForCausalLM", _GROUPED),
    ("smollm3", "SmolLM3ForCausalLM", _GROUPED),
    ("starcoder2", "Starcoder2ForCausalLM", _GROUPED),
    ("persimmon", "PersimmonForCausalLM", _DECODER),
    ("nemotron", "NemotronForCausalLM", _GROUPED),
    ("glm4", "Glm4ForCausalLM", _GROUPED),
    ("helium", "HeliumForCausalLM", _GROUPED),
    ("biogpt", "BioGptForCausalLM", _DECODER),
    (
        "xglm",
        "XGLMForCausalLM",
        {
            **IDS,
            "d_model": 32,
            "ffn_dim": 64,
            "num_layers": 3,
            "attention_heads": 2,
            "max_position_embeddings": 66,
            "use_cache": False,
        },
    ),
    (
        "mixtral",
        "MixtralForCausalLM",
        {**_GROUPED, "num_local_experts": 4, "experts_implementation": "batched_mm"},
    ),
    (
        "mamba",
        "MambaForCausalLM",
        {**HIDDEN, **IDS, "state_size": 4, "time_step_rank": 4, "use_cache": False},
    ),
)

ARCHITECTURES = tuple(
    hugging_face(name, "decoder", model, settings, texts) for name, model, settings in _ROWS
)
