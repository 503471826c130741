#!/usr/bin/env bash
# LLaVA-Bench in the wild: answers, and the commands that have GPT-4 judge them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

BENCH=llava-bench-in-the-wild
answer llava-bench "$ANSWERS/$BENCH/answers/$CKPT.jsonl"
cat <<EOT
GPT-4 compares them with its own answers, which costs money and needs openai<1 and OPENAI_API_KEY:
    mkdir -p $ANSWERS/$BENCH/reviews
    python ${LLAVA:-LLaVA}/llava/eval/eval_gpt_review_bench.py --question $DATA/$BENCH/questions.jsonl \\
        --context $DATA/$BENCH/context.jsonl --rule ${LLAVA:-LLaVA}/llava/eval/table/rule.json \\
        --answer-list $DATA/$BENCH/answers_gpt4.jsonl $RESULTS --output $ANSWERS/$BENCH/reviews/$CKPT.jsonl
    python ${LLAVA:-LLaVA}/llava/eval/summarize_gpt_review.py -f $ANSWERS/$BENCH/reviews/$CKPT.jsonl
EOT
