#!/usr/bin/env bash
# Stage 1: the generator (or LLaVA's projector) alone learns from captions; everything else is frozen.
# MM_PROJECTOR_TYPE=vlora|vlora_fast|mlp2x_gelu scripts/pretrain.sh
# What else can be set: see scripts/recipe.sh. Lines that differ from LLaVA's scripts/v1_5/pretrain.sh say why.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"

LLM=${LLM:-lmsys/vicuna-7b-v1.5}                 # 7B, the size that the VLoRA paper trains
DATA=${DATA:-playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}   # the paper takes 30M of CapsFusion instead
IMAGES=${IMAGES:-playground/data/LLaVA-Pretrain/images}
OUT=${OUT:-checkpoints/$MM_PROJECTOR_TYPE-7b-pretrain}
PER_DEVICE=${PER_DEVICE:-32}
if [[ $MM_PROJECTOR_TYPE == vlora ]]; then
    GLOBAL_BATCH=${GLOBAL_BATCH:-768}            # the paper's; LLaVA takes 256
    LEARNING_RATE=${LEARNING_RATE:-5e-5}         # the paper's; LLaVA's 1e-3 is for a projector of two layers
else                                             # LLaVA's; for fast weights none are published
    GLOBAL_BATCH=${GLOBAL_BATCH:-256}
    LEARNING_RATE=${LEARNING_RATE:-1e-3}
fi
need "file DATA" "$DATA"
need "folder IMAGES" "$IMAGES"
ACCUMULATION=$(accumulation "$GLOBAL_BATCH")

# train_mem below the launcher of this package instead of train_mem.py: it registers the generators.
# save_steps: every 2000 instead of 24000, because a run that breaks should not start again.
train \
    --deepspeed "$SCRIPTS/zero2.json" \
    --model_name_or_path "$LLM" \
    --version plain \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "${VISION_TOWER:-openai/clip-vit-large-patch14-336}" \
    --mm_projector_type "$MM_PROJECTOR_TYPE" \
    "${GENERATOR[@]}" \
    --tune_mm_mlp_adapter True \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --bf16 True \
    --output_dir "$OUT" \
    --num_train_epochs 1 \
    --per_device_train_batch_size "$PER_DEVICE" \
    --gradient_accumulation_steps "$ACCUMULATION" \
    --evaluation_strategy no \
    --save_strategy steps \
    --save_steps 2000 \
    --save_total_limit 1 \
    --learning_rate "$LEARNING_RATE" \
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
