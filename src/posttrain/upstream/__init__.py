"""The private parts of TRL, transformers, PEFT, accelerate and torch that posttrain uses.

    torch          hooks and parameters of modules; undoing fully_shard
    accelerate     FSDP on a CPU, samplers after a resume, autocast's wrapper, a configuration's environment
    transformers   columns, samplers and checkpoints of a trainer; a model's commit, blocks, cache and parallel plan
    peft           switching adapters, the forward of LoRA layers, the table of methods
    trl            functions that are not exported; its fused head; metrics of a trainer

The rest of posttrain calls the functions of these modules. The tables below list what upstream must keep: methods that
our subclasses override, functions that are called or replaced, attributes that are read. tests/upstream checks them
against the installed versions, and finds private names that are used anywhere else. So an upgrade of a library is work
in this folder only.

Verified with trl 1.16.0, transformers 5.23, peft 0.21.2, accelerate 1.15, torch 2.13 and DeepSpeed 0.19.8.
"""

Parameters = tuple[str, ...]
"""The names of a function's parameters, in order; `*args` is "args"."""

OVERRIDDEN: dict[str, dict[str, Parameters]] = {
    "transformers.Trainer": {
        "train": ("self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
        "training_step": ("self", "model", "inputs", "num_items_in_batch"),
        "compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
        "prediction_step": ("self", "model", "inputs", "prediction_loss_only", "ignore_keys"),
        "evaluate": ("self", "eval_dataset", "ignore_keys", "metric_key_prefix"),
        "log": ("self", "logs", "start_time"),
        "create_optimizer": ("self", "model"),
        "get_train_dataloader": ("self",),
        "save_model": ("self", "output_dir", "_internal_call"),
        "create_model_card": (
            "self", "language", "license", "tags", "model_name", "finetuned_from", "tasks", "dataset_tags", "dataset",
            "dataset_args",
        ),
        "_prepare_inputs": ("self", "inputs"),
        "_prepare_for_training": ("self", "max_steps", "train_dataloader", "resume_from_checkpoint"),
        "_get_train_sampler": ("self", "train_dataset"),
        "_get_eval_sampler": ("self", "eval_dataset"),
        "_clip_grad_norm": ("self", "model"),
        "_get_grad_norm": ("self", "model", "grad_norm"),
        "_sync_replicated_trainable_parameters": ("self", "model"),
        "_save": ("self", "output_dir", "state_dict"),
        "_save_checkpoint": ("self", "model", "trial"),
        "_save_optimizer_and_scheduler": ("self", "output_dir"),
        "_save_rng_state": ("self", "output_dir"),
        "_load_from_checkpoint": ("self", "resume_from_checkpoint", "model"),
        "_load_optimizer_and_scheduler": ("self", "checkpoint"),
    },
    "accelerate.ParallelismConfig": {"_validate_accelerator": ("self", "accelerator")},
    "peft.tuners.tuners_utils.BaseTuner": {
        "_create_and_replace": (
            "self", "peft_config", "adapter_name", "target", "target_name", "parent", "current_key", "parameter_name",
        ),
    },
    "transformers.cache_utils.DynamicLayer": {"update": ("self", "key_states", "value_states", "args", "kwargs")},
    "transformers.trainer_pt_utils.LengthGroupedSampler": {
        "__init__": ("self", "batch_size", "dataset", "lengths", "model_input_name", "generator"),
    },
}  # fmt: skip
"""Methods that a subclass of ours overrides: class -> method -> parameters."""

CALLED: dict[str, Parameters] = {
    "transformers.Trainer._get_dataloader": (
        "self", "dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key",
    ),
    "transformers.Trainer._get_output_dir": ("self", "trial"),
    "transformers.Trainer._set_signature_columns_if_needed": ("self",),
    "transformers.Trainer.get_tp_size": ("self",),
    "transformers.LlamaForCausalLM._supports_default_dynamic_cache": (),
    # `models.cpu.decoding` and `models.generation` pass a cache as `past_key_values`, which 5.24 calls `cache`.
    "transformers.LlamaForCausalLM.forward": (
        "self", "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels",
        "use_cache", "logits_to_keep", "kwargs",
    ),
    "transformers.distributed.tensor_parallel.TensorParallelLayer.shard_param": ("self", "module", "param", "mesh"),
    "transformers.distributed.tensor_parallel.TensorParallelLayer.install_forward": ("self", "module", "mesh"),
    "transformers.integrations.deepspeed.unset_hf_deepspeed_config": (),
    "accelerate.commands.launch._validate_launch_command": ("args",),
    "accelerate.utils.launch.prepare_deepspeed_cmd_env": ("args",),
    "accelerate.utils.launch.prepare_multi_gpu_env": ("args",),
    "peft.tuners.tuners_utils.BaseTuner._replace_module": ("self", "parent", "child_name", "new_module", "child"),
    "peft.tuners.tuners_utils.BaseTunerLayer._move_adapter_to_device_of_base_layer": ("self", "adapter_name", "device"),
    "torch.distributed.fsdp.FSDPModule._get_fsdp_state": ("self",),
    "trl.trainer.utils.add_fused_lm_head": ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
    "trl.trainer.utils.use_adapter": ("model", "adapter_name"),
    "trl.trainer.utils.disable_dropout_in_model": ("model",),
    "trl.trainer.utils.get_peak_flops": ("device_name", "dtype"),
    "trl.trainer.utils.compute_flops_per_token": ("config", "seq_len"),
    "trl.models.utils.unwrap_model_for_generation": (
        "model", "accelerator", "gather_deepspeed3_params", "generation_kwargs", "gradient_checkpointing_kwargs",
    ),
    "trl.import_utils.is_vllm_available": ("min_version",),
    "trl.generation.vllm_generation.VLLMGeneration.sync_weights": ("self",),
    "trl.generation.vllm_generation.VLLMGeneration.generate": (
        "self", "prompts", "images", "num_generations", "profiler",
    ),
    "trl.DPOTrainer.compute_ref_log_probs": ("self", "model", "inputs"),
}  # fmt: skip
"""Functions that are called: path -> parameters."""

REPLACED: dict[str, Parameters] = {
    "transformers.Trainer.training_step": ("self", "model", "inputs", "num_items_in_batch"),
    "transformers.Trainer.compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    "transformers.Trainer.get_batch_samples": ("self", "epoch_iterator", "num_batches", "device"),
    "transformers.Trainer._get_train_sampler": ("self", "train_dataset"),
    "transformers.Trainer._save": ("self", "output_dir", "state_dict"),
    "transformers.Trainer._load_from_checkpoint": ("self", "resume_from_checkpoint", "model"),
    "accelerate.Accelerator.backward": ("self", "loss", "kwargs"),
    "accelerate.Accelerator.gather": ("self", "tensor"),
    "accelerate.Accelerator.gather_for_metrics": ("self", "input_data", "use_gather_object"),
    "peft.tuners.lora.Linear.forward": ("self", "x", "args", "kwargs"),
    "torch.nn.Linear.forward": ("self", "input"),
    "trl.trainer.utils.maybe_gather_lm_head_ctx": ("params",),
    # Of trl.trainer.utils, which has them under the names _ChunkedLogProbFunction and _use_triton:
    "trl.kernels.ChunkedLogProbFunction.forward": (
        "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
        "logit_scale", "outputs",
    ),
    "trl.kernels.chunked_logprob._use_triton": ("device",),
}  # fmt: skip
"""Functions that are replaced by ours, on an object, a class or a module: path -> parameters."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "transformers.Trainer": (
        "_signature_columns", "loss_is_scaled_for_ga", "model_accepts_loss_kwargs", "compute_loss_func",
        "current_gradient_accumulation_steps", "is_distributed_loading_by_transformers",
    ),
    "transformers.PreTrainedModel": ("_no_split_modules",),
    "transformers.PreTrainedConfig": ("_commit_hash", "name_or_path"),
    "trl.SFTTrainer": ("_metrics", "_total_train_tokens", "_tp_size"),
    "trl.DPOTrainer": (
        "_metrics", "_total_train_tokens", "_tp_size", "loss_types", "loss_weights", "precompute_ref_logps",
    ),
    "trl.trainer.utils": ("_ChunkedLogProbFunction.apply", "_use_triton"),
    "accelerate.Accelerator": ("_original_forward",),
    "accelerate.state.PartialState": ("_shared_state",),
    "peft.mapping": ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING"),
    "peft.tuners.tuners_utils.BaseTunerLayer": ("_active_adapter", "_disable_adapters"),
    "peft.utils.other.AuxiliaryTrainingWrapper": ("_active_adapter", "_disable_adapters"),
    "torch.nn.Module": (
        "_parameters", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    ),
    "torch.distributed.fsdp._fully_shard._fully_shard": ("_orig_cls_mro_index",),
    "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState": (
        "_pre_forward_hook_handle", "_post_forward_hook_handle", "_fsdp_param_groups",
    ),
    "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup": (
        "_module_to_pre_save_state_dict_hook_handle", "_module_to_pre_load_state_dict_hook_handle", "fsdp_params",
    ),
    "torch.distributed.fsdp._fully_shard._fsdp_param.FSDPParam": ("_post_load_hook_handle",),
    "trackio.run.Run": ("_config_logged", "_next_step"),
    "wandb_workspaces.workspaces.interface.Workspace": ("_internal_name", "_internal_id"),
}  # fmt: skip
"""Attributes that are read or set; the source of the class or module must contain them: path -> names."""

LACKING: dict[str, tuple[str, ...]] = {
    "accelerate.data_loader.SkipBatchSampler": ("set_epoch",),
    "peft.utils.peft_types.PeftType": ("BOTTLENECK",),
}
"""What is added here because upstream lacks it: path -> names. Remove ours once upstream has one."""
