"""Sim-LLM: similar tasks lend each other their KV (Luo et al., "Sim-LLM: Optimizing LLM Inference at the Edge through
Inter-Task KV Reuse", NeurIPS 2025). The public names; the code is in `kvarena.contenders.simllm`.

`SimLLMInference` is the whole of it for a Llama model; the parts can be used alone. Approximate, but for misses and,
in mode "aligned", for prompts that begin as an earlier one does and share nothing else with it.
"""

from kvarena.contenders.simllm.inference import SimLLMInference, TaskAnswer, create_sim_llm_inference
from kvarena.contenders.simllm.manager import InterTaskKVManager, TaskMatch
from kvarena.contenders.simllm.modeling import LlamaForCausalLMWithKVReuse, LlamaModelWithKVReuse
from kvarena.contenders.simllm.params import AlignedParams, AutoThresholdParams, SimLLMParams
from kvarena.contenders.simllm.shared_tasks import SharedTasks, TaskFormat
from kvarena.contenders.simllm.similarity import AgreementSample, LSHIndex
from kvarena.contenders.simllm.task import TaskCacheEntry, TaskOutcome

__all__ = [
    "AgreementSample",
    "AlignedParams",
    "AutoThresholdParams",
    "InterTaskKVManager",
    "LSHIndex",
    "LlamaForCausalLMWithKVReuse",
    "LlamaModelWithKVReuse",
    "SharedTasks",
    "SimLLMInference",
    "SimLLMParams",
    "TaskAnswer",
    "TaskCacheEntry",
    "TaskFormat",
    "TaskMatch",
    "TaskOutcome",
    "create_sim_llm_inference",
]
