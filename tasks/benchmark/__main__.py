from tasks.core.shell import main
from tasks.benchmark import stage

main(stage)
