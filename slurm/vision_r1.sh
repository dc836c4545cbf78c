#!/usr/bin/env bash
# The whole of Vision-R1 as SLURM jobs that wait for each other: cold start, RL, evaluation. What is complete is left out,
# so the same command goes on after a failure.
#
#   slurm/vision_r1.sh [--toy] [--dry-run] [options for sbatch, like --nodes=8 --time=24:00:00]
#
# It writes the commands to runs/slurm/vision_r1/submit.sh, with the resolved recipes beside it, and runs them unless it is
# a dry run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/site.conf
toy='' dry='' nodes=1 options=()
for argument in "$@"; do
    case $argument in
        --toy) toy=yes ;;
        --dry-run) dry=yes ;;
        -h | --help) sed -n '2,8s/^# \{0,1\}//p' slurm/vision_r1.sh; exit ;;
        --nodes=*) nodes=${argument#*=} ;;
        --gpus-per-node=*) SBATCH_GPUS_PER_NODE=${argument#*=} options+=("$argument") ;;
        -N* | -G* | --gpus=* | --gres=*)
            echo "error: $argument: write --nodes=N and --gpus-per-node=N, from which the jobs are planned" >&2
            exit 2
            ;;
        -*) options+=("$argument") ;;
        *) echo "error: $argument: options for sbatch are written --name=value" >&2; exit 2 ;;
    esac
done
[[ $nodes =~ ^[1-9][0-9]*$ ]] || { echo "error: --nodes=$nodes: needs one number" >&2; exit 2; }
site_environment || { echo "error: site_environment in slurm/site.conf failed: is the environment installed?" >&2; exit 2; }
gpus=${SBATCH_GPUS_PER_NODE:-$PROCESSES_PER_NODE}
gpus=${gpus##*:} # a type may come first
if [ -n "$toy" ]; then
    recipes=(recipes/toy/pretrain.yaml recipes/toy/cold_start.yaml recipes/toy/ptst.yaml)
    evaluate=(--data runs/toy/data/rl --split test --max_new_tokens 384 --batch_size 120 --buckets 96 192)
    [ -f runs/toy/data/model/processor_config.json ] || # the last file that it writes
        python -W ignore -m vision_r1_recipes.toy runs/toy/data
else
    recipes=(recipes/cold_start.yaml recipes/ptst.yaml)
    evaluate=(--data Osilly/Vision-R1-rl --split test)
fi
folder=runs/slurm/vision_r1${toy:+_toy}
mkdir -p "$folder"
script=$folder/submit.sh
printf '#!/usr/bin/env bash\nset -euo pipefail\ncd %q\n' "$PWD" > "$script"
previous=

job() { # NAME NODES SCRIPT ARGUMENTS
    local name=$1 command
    printf -v command ' %q' sbatch --parsable --job-name="vision_r1-$name" "${options[@]}" --nodes="$2"
    shift 2
    # singleton: the same command given again waits for what it has submitted before, and finds it finished.
    command+=" --kill-on-invalid-dep=yes --dependency=${previous:+afterok:\"\$$previous\",}singleton"
    printf -v command '%s%s' "$command" "$(printf ' %q' "$@")"
    # shellcheck disable=SC2016 # for the script
    printf '%s=$(%s)\n%s=${%s%%%%;*}\necho "%s: job $%s"\n' "$name" "${command# }" "$name" "$name" "$name" "$name" >> "$script"
    echo "$name:$command"
    previous=$name
}

for recipe in "${recipes[@]}"; do
    name=$(basename "$recipe" .yaml)
    state=$(python -W ignore -m vision_r1_recipes.recipe state "$recipe")
    if [ "$state" = finished ]; then
        echo "$name: finished"
        continue
    fi
    # A cold start's small batch doesn't spread over all the nodes that RL can use: halve them until it fits.
    for ((n = nodes, said = 0; n > 0; n /= 2)); do
        plan=$(python -W ignore -m vision_r1_recipes.recipe plan "$recipe" --gpus $((n * gpus))) && break
        ((said++)) || problem=$plan
    done
    if [ "$n" -eq 0 ]; then
        echo "$problem" >&2
        exit 2
    fi
    python -W ignore -m vision_r1_recipes.recipe expand "$recipe" > "$folder/$name.yaml"
    job "$name" "$n" slurm/train.slurm "$recipe"
done
model=$(python -W ignore -m vision_r1_recipes.recipe get "$recipe" output_dir)
if [ -z "$previous" ] && [ -f "$model/eval/vision_r1/summary.json" ]; then
    echo "evaluate: finished, $model/eval/vision_r1/summary.json"
else
    job evaluate 1 slurm/evaluate.slurm "$model" "${evaluate[@]}" --output_dir "$model/eval/vision_r1"
fi
[ -n "$dry" ] || bash "$script"
