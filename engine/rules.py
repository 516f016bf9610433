"""Rules between settings: each value is right by itself, but not together with the others.

Like engine/config.py it imports no torch, reads neither environment nor hardware, and changes no value.
"""

from collections.abc import Collection, Sequence

from engine.data import DIALOGUES, DOCUMENTS, LABELLED, PADDED, SEPARATING, TEXTS, TOKENIZERS, UTTERING
from engine.optimizers import ON_DEVICE_ONLY, RECORDED
from engine.pruning import rules as pruning

SHAPES = 8  # torch._dynamo.config.recompile_limit
SHORTEST_INTERVAL = 0.05  # seconds between two looks at the device
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")  # of compile_mode
Check = tuple[tuple[str, ...], bool, str]  # (settings that decide it, is broken, message)


def problems(config, unknown: Collection[str]) -> list[str]:
    """The rules that `config`, an engine.config.Config, breaks; none that hangs on an `unknown` value."""
    checks = [
        *_data(config),
        *_model(config.model),
        *_reciprocal(config),
        *_batch(config),
        *_shards(config.parallel),
        *_lr(config.optimizer),
        *_offload(config.optimizer),
        *_spam(config.optimizer),
        *_steps(config),
        *_lengths(config),
        *_curriculum(config),
        *pruning.checks(config),
        *_memory(config),
        *_gradient_sums(config),
        *_step_graph(config),
        *_evaluation(config),
        *_samples(config.evaluation),
        *_probes(config),
        *_attention_metrics(config),
        *_latency(config),
        *_monitor(config.logging.monitor_interval),
        *_names(config.run),
    ]
    return [message for names, broken, message in checks if broken and not set(names) & set(unknown)]


def _data(c) -> list[Check]:
    """Which data sets a model is for, and which tokenizers a data set is for."""
    d, labelled = c.data, c.data.dataset in LABELLED
    wanted = {"classifier": LABELLED, "double_heads": DIALOGUES}.get(c.model.model, TEXTS)
    words = PADDED if labelled else [name for name in TOKENIZERS if name not in PADDED]
    kind = "rows are padded with id 0" if labelled else "text is not padded"
    if d.dataset in DOCUMENTS:
        words, kind = SEPARATING, "documents are divided by an end-of-text token"
    if d.dataset in DIALOGUES:
        words, kind = UTTERING, "utterances have no line ends"
    return [
        (
            ("model", "dataset"),
            d.dataset not in wanted,
            f"model = {c.model.model!r}: cannot learn from dataset = {d.dataset!r}; it needs one of "
            f"{', '.join(wanted)}",
        ),
        (
            ("dataset", "tokenizer"),
            d.tokenizer not in words,
            f"tokenizer = {d.tokenizer!r}: not for dataset = {d.dataset!r}, because its {kind}; set it to one of "
            f"{', '.join(words)}",
        ),
        (
            ("model", "context", "max_reply_tokens"),
            c.model.model == "double_heads" and c.model.context <= d.max_reply_tokens,
            f"context = {c.model.context}: must be more than max_reply_tokens = {d.max_reply_tokens}, which are "
            "behind what was said before",
        ),
        (
            ("shared_context", "positions"),
            c.model.shared_context and c.model.positions == "rotary",
            "shared_context = true: candidates stand at the same positions, and positions = 'rotary' are those of "
            "the tensor; set positions = 'learned'",
        ),
        (
            ("text_column",),
            not all(name.strip() for name in d.text_column.split(",")),
            f"text_column = {d.text_column!r}: must be names of columns with commas between them",
        ),
        (
            ("text_column", "label_column"),
            d.label_column in [name.strip() for name in d.text_column.split(",")],
            f"label_column = {d.label_column!r}: is a text_column too, so the model would read the answer",
        ),
    ]


def _model(m) -> list[Check]:
    latent = m.attention_form == "latent"
    rotated_name, rotated = (
        ("latent_width", m.latent_width) if latent else ("width / heads", m.width // m.heads)
    )
    return [
        (
            ("width", "heads"),
            m.width % m.heads != 0,
            f"width = {m.width}: must be a multiple of heads = {m.heads}",
        ),
        (
            ("positions", "attention_form", "width", "heads", "latent_width"),
            m.positions == "rotary" and rotated % 2 != 0,
            f"positions = 'rotary': {rotated_name} = {rotated}: must be even, because features turn in pairs",
        ),
        (
            ("attention_form", "latent_query", "latent_value", "heads"),
            latent and m.heads > 1 and m.latent_query == m.latent_value == "shared",
            f"latent_query and latent_value = 'shared': all {m.heads} heads would be one and the same; share one "
            "of the two, or set heads = 1",
        ),
    ]


def _reciprocal(c) -> list[Check]:
    """Which implementations have the reciprocal term, and what flex cannot."""
    m, alpha = c.model, c.model.reciprocal_alpha
    asked = "attention = 'flex'"
    cannot = [
        ("reciprocal_alpha", not alpha, "is for the reciprocal term alone; set attention = 'sdpa'"),
        ("compile", c.compile.compile == "none", "is fused in a compiled graph only; set compile = 'model'"),
        ("precision", c.training.precision == "fp32", "multiplies in 16 bits only; set precision = 'bf16'"),
        ("dropout", m.dropout > 0, f"has no dropout (dropout = {m.dropout}); set attention = 'manual'"),
        (
            "latent_width",
            bool(alpha) and not 16 <= m.latent_width <= 128,
            f"takes a latent_width from 16 to 128, not {m.latent_width}; set attention = 'manual'",
        ),
    ]
    return [
        (
            ("reciprocal_alpha", "attention"),
            alpha != 0 and m.attention not in ("manual", "flex"),
            f"reciprocal_alpha = {alpha}: no kernel of SDPA has the reciprocal term; set attention = 'manual' (its "
            f"scores written out) or 'flex' (a GPU's compiled kernels), not {m.attention!r}",
        ),
        *(
            (("attention", name), m.attention == "flex" and broken, f"{asked}: {why}")
            for name, broken, why in cannot
        ),
    ]


def _batch(c) -> list[Check]:
    """How the batch divides over processes and micro-batches."""
    batch, tensor, processes = c.training.batch_size, c.parallel.tensor_parallel, c.parallel.processes
    micro, replicas = c.training.micro_batch_size or 1, max(processes // tensor, 1)
    replicas = replicas if c.parallel.shard_samples else 1
    shared = "processes" if tensor == 1 else "processes / tensor_parallel"
    parts = f"{shared} = {replicas}"
    if c.training.micro_batch_size:
        parts = f"micro_batch_size × {shared} = {micro} × {replicas}"
    return [
        (
            ("batch_size", "micro_batch_size", "processes", "tensor_parallel"),
            batch % (micro * replicas) != 0,
            f"batch_size = {batch}: must be a multiple of {parts}",
        ),
        (
            ("processes", "tensor_parallel"),
            processes % tensor != 0,
            f"processes = {processes}: must be a multiple of tensor_parallel = {tensor}",
        ),
    ]


def _shards(p) -> list[Check]:
    """Every process reading the same is a mistake, unless it is asked for."""
    return [
        (
            ("shard_samples", "on_shared_samples"),
            not p.shard_samples and p.on_shared_samples == "refuse",
            "shard_samples = false: all processes would read the same samples, which is work that counts once; set "
            "shard_samples = true, or on_shared_samples = 'report' to train all the same and have its figures say so",
        ),
        (
            ("shard_samples", "processes", "tensor_parallel"),
            not p.shard_samples and p.processes == p.tensor_parallel,
            "shard_samples = false: would do nothing where one process reads the samples",
        ),
    ]


def _lr(o) -> list[Check]:
    return [
        (
            ("lr_rule", "lr_batch_size"),
            o.lr_rule != "none" and not o.lr_batch_size,
            f"lr_rule = {o.lr_rule!r}: needs lr_batch_size, the batch size for which lr = {o.lr:g} is meant",
        )
    ]


def _offload(o) -> list[Check]:
    return [
        (
            ("optimizer_offload", "optimizer"),
            o.optimizer_offload and o.optimizer in ON_DEVICE_ONLY,
            f"optimizer_offload = true: not with optimizer = {o.optimizer!r}, which needs all of its state before it "
            "updates the first parameter; set optimizer_offload = false",
        )
    ]


def _spam(o) -> list[Check]:
    period, warmup = o.spam_reset_steps, o.spam_warmup_steps
    return [
        (
            ("optimizer", "spam_warmup_steps", "spam_reset_steps"),
            o.optimizer == "spam" and 0 < period < warmup,
            f"spam_warmup_steps = {warmup}: updates would never reach their full size, because a reset comes every "
            f"spam_reset_steps = {period}; set it to ≤ {period}, or spam_reset_steps = 0",
        )
    ]


def _steps(c) -> list[Check]:
    steps, warmup, traced = c.training.steps, c.schedule.warmup_steps, c.runtime.profile_steps
    return [
        (
            ("warmup_steps", "steps"),
            warmup > steps,
            f"warmup_steps = {warmup}: must be ≤ steps = {steps}",
        ),
        (
            ("profile_steps", "steps"),
            traced > 0 and steps < traced + 4,
            f"profile_steps = {traced}: needs steps ≥ {traced + 4}, because the first are warm-up",
        ),
    ]


def _lengths(c) -> list[Check]:
    """Lengths double from first_length to context, and each has a step at least."""
    first, steps, context = c.training.first_length, c.training.lengthening_steps, c.model.context
    doublings = (context // first).bit_length() - 1 if first else 0
    names = ("first_length", "lengthening_steps")
    return [
        (
            ("first_length", "context"),
            first > 0 and (first << doublings != context or not doublings),
            f"first_length = {first}: must double to context = {context}: {context} / 2, / 4, / 8 or so on, if whole",
        ),
        (
            names,
            bool(steps) and not first,
            f"lengthening_steps = {steps}: would do nothing with first_length = 0",
        ),
        (
            (*names, "context", "steps"),
            first > 0 and not doublings <= steps <= c.training.steps,
            f"lengthening_steps = {steps}: must be from {doublings}, so that each shorter length has a step, to "
            f"steps = {c.training.steps}",
        ),
        (
            ("first_length", "context", "compile", "compile_dynamic"),
            c.compile.compile != "none" and not c.compile.compile_dynamic and doublings >= SHAPES,
            f"first_length = {first}: {doublings + 1} lengths are more shapes than the {SHAPES} that torch.compile "
            "makes graphs for; set a longer first_length, or compile_dynamic = true",
        ),
    ]


def _curriculum(c) -> list[Check]:
    t = c.training
    return [
        (
            ("curriculum", "curriculum_steps", "steps"),
            t.curriculum != "none" and not 1 <= t.curriculum_steps <= t.steps,
            f"curriculum_steps = {t.curriculum_steps}: must be from 1 to steps = {t.steps}",
        )
    ]


def _memory(c) -> list[Check]:
    mode, every = c.memory.activation_checkpointing, c.memory.checkpoint_every
    return [
        (
            ("checkpoint_every", "layers", "activation_checkpointing"),
            mode == "every_n" and every > c.model.layers,
            f"checkpoint_every = {every}: must be ≤ layers = {c.model.layers}",
        ),
        (
            ("activation_checkpointing", "compile"),
            mode == "budget" and c.compile.compile == "none",
            "activation_checkpointing = 'budget': the compiler does it; set compile = 'blocks' or 'model'",
        ),
        *(
            (
                ("activation_checkpointing", name),
                mode == "budget" and getattr(c.model, name) > 0,
                f"activation_checkpointing = 'budget': not with {name} = {getattr(c.model, name):g}: what the "
                "compiler computes again draws other random numbers, and gradients would be wrong (pytorch issue "
                f"190758); set {name} = 0, or 'selective'",
            )
            for name in ("dropout", "embedding_dropout", "token_dropout", "output_dropout")
        ),
    ]


def _gradient_sums(c) -> list[Check]:
    """What cannot be together with gradients that do not go through autograd."""
    t, mode, asked = c.training, c.compile.compile_mode, c.training.gradient_sums == "fused"
    cannot = [
        ("loss_kernel", t.loss_kernel == "full", "the head's is made by the loss; set loss_kernel = 'fused'"),
        ("float8", t.float8, "float8 has products of its own; set float8 = false"),
        (
            "data_parallel",
            c.parallel.data_parallel != "ddp",
            "FSDP2 sums gradients of shards itself; set data_parallel = 'ddp'",
        ),
        ("tensor_parallel", c.parallel.tensor_parallel > 1, "matrices are split; set tensor_parallel = 1"),
        (
            "compile_mode",
            c.compile.compile != "none" and mode in CUDA_GRAPH_MODES,
            f"the CUDA graphs of {mode!r} do not see them; set compile_mode = 'default'",
        ),
    ]
    return [
        (
            ("gradient_sums", name),
            asked and broken,
            f"gradient_sums = 'fused': not with {name} as it is: {why}",
        )
        for name, broken, why in cannot
    ]


def _step_graph(c) -> list[Check]:
    """What a step that is one CUDA graph cannot hold: whatever asks the device, counts on the host, changes shape."""
    t, o, m = c.training, c.optimizer, c.memory
    recomputes = m.activation_checkpointing not in ("none", "budget")
    cannot = [
        ("processes", c.parallel.processes, c.parallel.processes > 1, "it is of one process"),
        ("optimizer", o.optimizer, o.optimizer not in RECORDED, f"it can be one of {', '.join(RECORDED)}"),
        ("optimizer_offload", True, o.optimizer_offload, "its updates wait for the host"),
        ("precision", t.precision, t.precision == "fp16", "the host reads its loss scale; use bf16"),
        (
            "gradient_sums",
            t.gradient_sums,
            t.gradient_sums != "autograd",
            "its steps are counted; use autograd",
        ),
        (
            "pruning",
            c.pruning.pruning,
            c.pruning.pruning != "none",
            "the host knows when weights are ranked; use none",
        ),
        ("float8", True, t.float8, "not tried"),
        ("first_length", t.first_length, t.first_length > 0, "all steps must have one shape; use 0"),
        (
            "activation_checkpointing",
            m.activation_checkpointing,
            recomputes,
            "it asks for random states; use none",
        ),
        (
            "compile_mode",
            c.compile.compile_mode,
            c.compile.compile != "none" and c.compile.compile_mode in CUDA_GRAPH_MODES,
            "it has graphs of its own; use default",
        ),
        (
            "noise_scale_interval",
            c.logging.noise_scale_interval,
            c.logging.noise_scale_interval > 0,
            "it looks into steps; use 0",
        ),
        ("profile_steps", c.runtime.profile_steps, c.runtime.profile_steps > 0, "there are no parts; use 0"),
    ]
    return [
        (
            ("step_graph", name),
            c.compile.step_graph and broken,
            f"step_graph = true: not with {name} = {value!r}: {why}",
        )
        for name, value, broken, why in cannot
    ]


def _evaluation(c) -> list[Check]:
    wanted, stream = c.evaluation.eval_precision, c.model.residual_precision
    return [
        (
            ("eval_precision", "residual_precision", "float8"),
            wanted in ("fp32", "fp16") and (stream == "bf16" or c.training.float8),
            f"eval_precision = {wanted!r}: a model with a bf16 residual stream or float8 layers is scored in bf16; "
            "set eval_precision = 'bf16' for all runs",
        ),
    ]


def _samples(e) -> list[Check]:
    return [
        (
            ("sample_prompt", "sample_tokens"),
            bool(e.sample_prompt) and not e.sample_tokens,
            f"sample_prompt = {e.sample_prompt!r}: would do nothing with sample_tokens = 0",
        )
    ]


def _probes(c) -> list[Check]:
    noise, accumulates = (
        c.logging.noise_scale_interval,
        0 < c.training.micro_batch_size < c.training.batch_size,
    )
    layers, stride = c.model.layers, c.evaluation.eval_stride
    probed = {
        f"{what}_norm_layers": getattr(c.logging, f"{what}_norm_layers")
        for what in ("activation", "gradient")
    }
    return [
        (
            ("noise_scale_interval", "steps"),
            noise > c.training.steps,
            f"noise_scale_interval = {noise}: must be ≤ steps = {c.training.steps}",
        ),
        (
            ("noise_scale_interval", "micro_batch_size", "batch_size"),
            noise > 0 and not accumulates,
            f"noise_scale_interval = {noise}: compares the micro-batches of a step, and there is one; set "
            "micro_batch_size to half of batch_size or less",
        ),
        (
            ("noise_scale_interval", "optimizer"),
            noise > 0 and c.optimizer.optimizer == "adamwspam_legacy",
            f"noise_scale_interval = {noise}: not with optimizer = 'adamwspam_legacy', which cuts gradients "
            "before the norm of a step is taken, but not those of one micro-batch; set noise_scale_interval = 0",
        ),
        (
            ("eval_stride", "context"),
            stride > c.model.context,
            f"eval_stride = {stride}: must be ≤ context = {c.model.context}",
        ),
        *(
            (
                (name, "layers"),
                any(not 0 <= block < layers for block in blocks),
                f"{name} = {list(blocks)}: blocks are numbered 0 to {layers - 1}",
            )
            for name, blocks in probed.items()
        ),
        *(
            ((name,), len(set(blocks)) < len(blocks), f"{name} = {list(blocks)}: names a block twice")
            for name, blocks in probed.items()
        ),
    ]


def _attention_metrics(c) -> list[Check]:
    count, window, tensor = (
        c.logging.attention_sequences,
        c.logging.reciprocity_window,
        c.parallel.tensor_parallel,
    )
    return [
        (
            ("attention_sequences", "reciprocity_window"),
            not count and window != type(c.logging)().reciprocity_window,
            f"reciprocity_window = {window}: would do nothing with attention_sequences = 0",
        ),
        (
            ("attention_sequences", "context"),
            count > 0 and c.model.context < 2,
            f"attention_sequences = {count}: a context of {c.model.context} token has no pairs to look at",
        ),
        (
            ("attention_sequences", "tensor_parallel"),
            count > 0 and tensor > 1,
            f"attention_sequences = {count}: not with tensor_parallel = {tensor}: a process has only some heads",
        ),
    ]


def _latency(c) -> list[Check]:
    found = latency_problems("latency_lengths", c.evaluation.latency_lengths, c.model.context)
    return [(("latency_lengths", "context"), True, message) for message in found]


def latency_problems(name: str, lengths: Sequence[int], context: int) -> list[str]:
    """What is wrong with the lengths that `name` gives, for a model that sees `context` tokens."""
    found = []
    if any(not 2 <= n <= context for n in lengths):
        found.append(f"{name} = {list(lengths)}: each must be from 2 to context = {context}")
    if len(set(lengths)) < len(lengths):
        found.append(f"{name} = {list(lengths)}: names a length twice")
    return found


def _monitor(interval: float) -> list[Check]:
    return [
        (
            ("monitor_interval",),
            0 < interval < SHORTEST_INTERVAL,
            f"monitor_interval = {interval:g}: must be 0 or ≥ {SHORTEST_INTERVAL:g}, so that it disturbs no step",
        )
    ]


def _names(run) -> list[Check]:
    return [
        (
            (name,),
            not value.replace("_", "").isalnum(),
            f"{name} = {value!r}: letters, digits and _ only, because it names files and stages",
        )
        for name, value in (("study", run.study), ("run", run.run))
    ]
