#!/usr/bin/env bash
# Stage 2 with a frozen language model: the generator (or projector) alone learns from instructions. Answers to text
# stay those of the language model, bit for bit; what is saved is the generator, which loads with --model-base.
# MM_PROJECTOR_TYPE=vlora_fast|vlora|mlp2x_gelu scripts/finetune_frozen.sh
# What else can be set: see scripts/recipe.sh. Lines that differ from LLaVA's scripts/v1_5/finetune.sh say why.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"

LLM=${LLM:-lmsys/vicuna-7b-v1.5}                 # 7B, the size that the VLoRA paper trains
DATA=${DATA:-playground/data/llava_v1_5_mix665k.json}
IMAGES=${IMAGES:-playground/data}
OUT=${OUT:-checkpoints/$MM_PROJECTOR_TYPE-7b-frozen}
PRETRAINED=${PRETRAINED:-checkpoints/$MM_PROJECTOR_TYPE-7b-pretrain/mm_projector.bin}
PER_DEVICE=${PER_DEVICE:-16}
GLOBAL_BATCH=${GLOBAL_BATCH:-128}                # LLaVA's and the paper's
# No rate is published for this stage. LLaVA's 2e-5 is for the language model: these are near those of stage 1.
if [[ $MM_PROJECTOR_TYPE == vlora ]]; then LEARNING_RATE=${LEARNING_RATE:-5e-5}; fi
LEARNING_RATE=${LEARNING_RATE:-2e-4}
need "file DATA" "$DATA"
need "folder IMAGES" "$IMAGES"
need "file PRETRAINED of stage 1" "$PRETRAINED"
ACCUMULATION=$(accumulation "$GLOBAL_BATCH")

# train_mem below the launcher of this package instead of train_mem.py: it registers the generators.
# zero2 as in stage 1: there are no gradients or optimizer states of the language model to divide.
# save_steps: every 1000 instead of 50000, because a run that breaks should not start again.
train \
    --vlora_freeze_llm True \
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
