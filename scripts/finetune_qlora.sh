#!/usr/bin/env bash
# Stage 2 with QLoRA: LoRA on a language model of 4 bits (BITS=8 for 8), for one small GPU.
# MM_PROJECTOR_TYPE=vlora|vlora_fast|mlp2x_gelu scripts/finetune_qlora.sh
# What else can be set: see scripts/recipe.sh. Lines that differ from LLaVA's scripts/v1_5/finetune_lora.sh say why.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"

LLM=${LLM:-lmsys/vicuna-7b-v1.5}                 # 7B, the size that the VLoRA paper trains
DATA=${DATA:-playground/data/llava_v1_5_mix665k.json}
IMAGES=${IMAGES:-playground/data}
OUT=${OUT:-checkpoints/$MM_PROJECTOR_TYPE-7b-qlora}
PRETRAINED=${PRETRAINED:-checkpoints/$MM_PROJECTOR_TYPE-7b-pretrain/mm_projector.bin}
PER_DEVICE=${PER_DEVICE:-16}
GLOBAL_BATCH=${GLOBAL_BATCH:-128}                # LLaVA's and the paper's
need "file DATA" "$DATA"
need "folder IMAGES" "$IMAGES"
need "file PRETRAINED of stage 1" "$PRETRAINED"
ACCUMULATION=$(accumulation "$GLOBAL_BATCH")

# train_mem below the launcher of this package instead of train_mem.py: it registers the generators.
# save_steps: every 1000 instead of 50000, because a run that breaks should not start again.
train \
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 \
    --bits "${BITS:-4}" \
    --deepspeed "$SCRIPTS/zero2.json" \
    --model_name_or_path "$LLM" \
    --version v1 \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "${VISION_TOWER:-openai/clip-vit-large-patch14-336}" \
    --pretrain_mm_mlp_adapter "$PRETRAINED" \
    --mm_projector_type "$MM_PROJECTOR_TYPE" \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --bf16 True \
    --output_dir "$OUT" \
    --num_train_epochs 1 \
    --per_device_train_batch_size "$PER_DEVICE" \
    --gradient_accumulation_steps "$ACCUMULATION" \
    --evaluation_strategy no \
    --save_strategy steps \
    --save_steps 1000 \
    --save_total_limit 1 \
    --learning_rate 2e-4 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --tf32 True \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --lazy_preprocess True \
    --report_to "${REPORT_TO:-tensorboard}" \
    "$@"
