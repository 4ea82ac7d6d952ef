"""Sim-LLM: similar tasks lend each other their KV (Luo et al., "Sim-LLM: Optimizing LLM Inference at the Edge through
Inter-Task KV Reuse", NeurIPS 2025).

`SimLLMInference` is the whole of it for a Llama model; the parts can be used alone. Approximate, but for misses and, in
mode "aligned", for prompts that begin as an earlier one does and share nothing else with it.
"""

from kvarena.simllm.entry import TaskCacheEntry
from kvarena.simllm.inference import SimLLMInference, TaskAnswer
from kvarena.simllm.lsh import LSHIndex
from kvarena.simllm.manager import InterTaskKVManager, TaskMatch
from kvarena.simllm.modeling import LlamaForCausalLMWithKVReuse, LlamaModelWithKVReuse
from kvarena.simllm.outcome import TaskOutcome
from kvarena.simllm.params import AlignedParams, AutoThresholdParams, SimLLMParams
from kvarena.simllm.shared_tasks import SharedTasks, TaskFormat
from kvarena.simllm.threshold import AgreementSample

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
]
