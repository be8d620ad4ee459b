"""What other tools call the settings of a recipe. Never accepted; named in the hint of the error.

Names from PEFT and transformers' Trainer, TRL, Axolotl, LLaMA-Factory, torchtune, LitGPT, Unsloth,
ms-swift and AutoTrain.
"""

HERE = {
    key: here
    for here, keys in {
        "model.name": "model_name_or_path base_model model_name checkpoint_dir pretrained "
        "model_id base_model_name_or_path",
        "model.revision": "model_revision",
        "model.precision": "bf16 fp16 tf32 dtype torch_dtype precision",
        "model.quantize": "load_in_4bit load_in_8bit quantization_bit quantization "
        "quantization_method bnb_4bit_quant_type quant_bits",
        "model.double_quant": "bnb_4bit_use_double_quant double_quantization",
        "task.name": "task_name task_type problem_type",
        "task.max_length": "max_seq_length max_seq_len cutoff_len sequence_len max_len block_size "
        "model_max_length truncation_max_length",
        "data.train": "train_file dataset datasets dataset_name data_path data_files",
        "data.train_split": "train_split dataset_split",
        "data.validation": "validation_file eval_file eval_dataset",
        "data.validation_split": "valid_split eval_split",
        "data.revision": "dataset_revision",
        "data.held_out": "val_set_size val_size validation_split test_size",
        "data.text": "text_column text_column_name sentence_column",
        "data.label": "label_column label_column_name target_column",
        "adapter.variant": "adapter finetuning_type tuner_type peft_type method",
        "adapter.rank": "r lora_r lora_rank lora_dim dim peft_r init_r",
        "adapter.alpha": "lora_alpha",
        "adapter.dropout": "lora_dropout",
        "adapter.targets": "target_modules lora_target lora_target_modules lora_target_linear "
        "lora_attn_modules",
        "adapter.exclude": "exclude_modules",
        "adapter.layers": "layers_to_transform",
        "adapter.ranks": "rank_pattern lora_rank_pattern",
        "adapter.also_train": "modules_to_save lora_modules_to_save additional_target",
        "adapter.init_from": "lora_model_dir adapter_name_or_path",
        "adapter.rslora": "use_rslora peft_use_rslora",
        "adapter.lr_ratio": "loraplus_lr_ratio loraplus_ratio lora_plus_ratio",
        "adapter.budget.target": "target_r target_rank",
        "adapter.budget.warmup": "tinit init_warmup",
        "adapter.budget.final": "tfinal final_warmup",
        "adapter.budget.interval": "deltaT mask_interval",
        "adapter.orthogonality": "orth_reg_weight reg_orth_coef",
        "train.epochs": "num_train_epochs num_epochs n_epochs",
        "train.steps": "max_steps num_steps total_steps",
        "train.batch_size": "per_device_train_batch_size micro_batch_size local_batch_size "
        "train_batch_size",
        "train.eval_batch_size": "per_device_eval_batch_size",
        "train.accumulate": "gradient_accumulation_steps accumulate_grad_batches",
        "train.optimizer": "optim optimizer_name",
        "train.activation_checkpointing": "gradient_checkpointing use_gradient_checkpointing "
        "enable_activation_checkpointing",
        "train.lr": "learning_rate",
        "train.weight_decay": "wd decay",
        "train.schedule": "lr_scheduler_type lr_scheduler scheduler",
        "train.warmup": "warmup_ratio warmup_steps lr_warmup_steps num_warmup_steps",
        "train.compile": "torch_compile",
        "train.clip": "max_grad_norm clip_grad_norm gradient_clipping max_norm",
        "train.eval_every": "eval_steps eval_strategy evaluation_strategy evals_per_epoch "
        "val_every_steps eval_interval",
        "train.save_every": "save_steps save_strategy saves_per_epoch ckpt_every_steps "
        "save_interval",
        "train.log_every": "logging_steps log_interval log_every_n_steps",
        "train.best": "metric_for_best_model load_best_model_at_end",
        "train.patience": "early_stopping early_stopping_patience early_stopping_steps",
        "output_dir": "out_dir output_path project_name save_dir",
        "seed": "random_seed manual_seed rng_seed",
    }.items()
    for key in keys.split()
}
"""Foreign name -> dotted key of a recipe."""

BY_COMMAND = {
    "resume_from_checkpoint": "`lorakit train RECIPE --resume`",
    "auto_resume_from_checkpoints": "`lorakit train RECIPE --resume`",
}
"""Foreign name -> the command that does it here."""
