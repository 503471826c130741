# Shared by the training recipes beside it; sourced, not run.
#
# What a recipe can be told through the environment:
#   MM_PROJECTOR_TYPE  vlora (default), vlora_fast or mlp2x_gelu: the one difference between the models
#   VLORA_DIM, VLORA_TYPE, SKIP_LAYERS, ...   settings of the generator in stage 1, named as its flags
#   LAUNCHER           deepspeed (default), torchrun, or python for one process without either
#   GPUS               processes on this machine (default: the GPUs that nvidia-smi lists, or 1)
#   NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   several machines with torchrun; under SLURM slurm.sh sets them.
#                      Two runs on one machine need two values of MASTER_PORT with deepspeed (default: 29500)
#   HOSTFILE           several machines with deepspeed: its list of hosts
#   PER_DEVICE         samples that a process takes at once; accumulation follows from the global batch
#   TRAINER            llava.train.train_mem (default, needs flash-attn) or llava.train.train
#   DRY_RUN            1 prints the command instead of running it
# Arguments of a recipe are passed on behind its own flags, so `finetune.sh --max_steps 10` works.

SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
MM_PROJECTOR_TYPE=${MM_PROJECTOR_TYPE:-vlora}
LAUNCHER=${LAUNCHER:-deepspeed}
NODES=${NODES:-1}
TRAINER=${TRAINER:-llava.train.train_mem}

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

if [[ -z ${GPUS:-} ]]; then
    GPUS=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
    GPUS=$((GPUS > 0 ? GPUS : 1))
fi
if [[ -n ${HOSTFILE:-} ]]; then
    [[ -f $HOSTFILE ]] || fail "there is no HOSTFILE $HOSTFILE"
    WORLD=$(awk '{for (i = 2; i <= NF; i++) if (sub("slots=", "", $i)) total += $i} END {print total + 0}' "$HOSTFILE")
    ((WORLD > 0)) || fail "HOSTFILE $HOSTFILE has no line such as 'node1 slots=8'"
else
    WORLD=$((GPUS * NODES))
fi

# accumulation GLOBAL_BATCH: steps that make up the global batch with WORLD processes of PER_DEVICE samples.
accumulation() {
    local once=$((WORLD * PER_DEVICE))
    (($1 % once == 0)) ||
        fail "a global batch of $1 is no multiple of $WORLD processes x PER_DEVICE=$PER_DEVICE samples; set PER_DEVICE"
    echo $(($1 / once))
}

# need WHAT PATH: a path that must be there; names such as lmsys/vicuna-7b-v1.5 are left to the hub.
need() {
    [[ -e $2 ]] || fail "there is no $1 $2"
}

# train FLAGS...: LLaVA's trainer with the plugin, below the chosen launcher.
train() {
    local command
    case $LAUNCHER in
        deepspeed)
            command=(deepspeed)
            if [[ -n ${HOSTFILE:-} ]]; then command+=(--hostfile "$HOSTFILE"); else command+=(--num_gpus "$GPUS"); fi
            if [[ -n ${MASTER_PORT:-} ]]; then command+=(--master_port "$MASTER_PORT"); fi
            command+=(--module llava_vlora.run "$TRAINER")
            ;;
        torchrun)
            command=(torchrun --nnodes "$NODES" --nproc_per_node "$GPUS")
            if ((NODES == 1)); then
                command+=(--standalone) # takes a free port, so that two runs on one machine do not collide
            else
                command+=(--node_rank "${NODE_RANK:?number of this machine, from 0}")
                command+=(--master_addr "${MASTER_ADDR:?name of machine 0}" --master_port "${MASTER_PORT:-29500}")
            fi
            command+=(-m llava_vlora.run "$TRAINER")
            ;;
        python)
            if [[ " $* " != *" --deepspeed= "* ]]; then
                # Without a launcher's variables, DeepSpeed asks MPI how many processes there are.
                export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1
                export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-29500}
            fi
            command=(python -m llava_vlora.run "$TRAINER")
            ;;
        *) fail "LAUNCHER is '$LAUNCHER'; choose deepspeed, torchrun or python" ;;
    esac
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf '%q ' "${command[@]}" "$@"
        echo
    else
        "${command[@]}" "$@"
    fi
}

# The generator, for stage 1; later stages read it from the folder of the one before. Of the paper's, all settings are
# stated; of others, those that were set. LLaVA's projectors have none.
if [[ $MM_PROJECTOR_TYPE == vlora ]]; then
    VLORA_DIM=${VLORA_DIM:-512} VLORA_DEPTH=${VLORA_DEPTH:-8} VLORA_HEADS=${VLORA_HEADS:-16}
    VLORA_RANK=${VLORA_RANK:-64} VLORA_ALPHA=${VLORA_ALPHA:-64} VLORA_TYPE=${VLORA_TYPE:-qkvom}
    SKIP_LAYERS=${SKIP_LAYERS:-4}
fi
GENERATOR=()
case $MM_PROJECTOR_TYPE in
    linear | identity | mlp*x_gelu) ;;
    *)
        for name in $(compgen -v VLORA_) SKIP_LAYERS; do
            if [[ -n ${!name:-} ]]; then GENERATOR+=("--$(tr '[:upper:]' '[:lower:]' <<<"$name")" "${!name}"); fi
        done
        ;;
esac
