#!/bin/bash
# Trains improved_alexnet on CIFAR-10 for 10 epochs (configs/cifar10.toml).
#
#   sbatch [--nodes=2] [--gpus-per-node=8] [--cpus-per-task=8] slurm/cifar10.sh [--SETTING VALUE ...]
#
# Options of sbatch override the lines below. Hooks for venv, conda and containers: slurm/body.sh and docs/slurm.md.
#SBATCH --job-name=cifar10
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

# Slurm runs a copy of this file from its spool folder; scontrol shows the original as Command, one line per array task.
project=$(dirname "$(dirname "$(readlink -f "$0")")")
[ ! -f "${PROJECT:-}/slurm/body.sh" ] || project=$PROJECT # some clusters set PROJECT to a storage folder
if [ ! -f "$project/slurm/body.sh" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    project=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's|^ *Command=||p' | head -n 1 |
        sed 's|/slurm/[^/ ]*\.sh\( .*\)\{0,1\}$||')
fi
if [ ! -f "$project/slurm/body.sh" ]; then
    echo "error: PROJECT = '$project': no slurm/body.sh there; name the checkout: sbatch --export=ALL,PROJECT=FOLDER ..." >&2
    exit 2
fi
. "$project/slurm/body.sh" "$project/configs/cifar10.toml" "$@"
