from tasks.core.shell import main
from tasks.report import stage

main(stage)
