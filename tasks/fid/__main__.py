from tasks.core.shell import main
from tasks.fid import stage

main(stage)
